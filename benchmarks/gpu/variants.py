"""Step 5: whether compiling the backbone pays here, and bfloat16 beside float16, in alternation."""

import math
import shutil

import torch

from benchmarks.rounds import ratios, take_turns

from . import runs
from .step import Step

SAME = 2e-2  # relative, of the losses after a few iterations from equal weights


def run(step: Step) -> None:
    float16 = ("float16", ("SOLVER.AMP.DTYPE", "float16"))
    compiled = ("COMPILE", ("MODEL.VISUAL.COMPILE", True))
    if not step.cuda:
        step.instead("float16", "float32")
        float16 = ("float32", ("SOLVER.AMP.ENABLED", False))
        step.instead("COMPILE, which takes minutes", "CHANNELS_LAST False")
        compiled = ("CHANNELS_LAST False", ("MODEL.VISUAL.CHANNELS_LAST", False))
    told = []
    for name, options in (float16, compiled):
        if step.late(f"{name} against eager bfloat16", 20 if name == "float16" else 60):
            continue
        ratio = _alternate(step, name, options)
        told.append(f"{name} {ratio['median']:.2f} times as fast")
        # at a fifth of the speed something is emulated, or compiled again in each iteration
        step.limit(f"{name}, speed", ratio["median"], "of bfloat16's", least=0.2, most=5)
    step.headline(", ".join(told) + " as eager bfloat16")


def _alternate(step: Step, name: str, options: tuple) -> dict[str, float]:
    """How many times as fast as the plain way, by round."""
    count = 10 if step.cuda else 2
    trainers, losses = {}, {}
    for way, given in (("bfloat16, eager", ()), (name, options)):
        folder = step.folder / f"variants {way}"
        shutil.rmtree(folder, ignore_errors=True)
        trainers[way] = runs.build_trainer(step, folder.name, *given)

    def turn(way: str) -> dict[str, float]:
        clock = runs.train(trainers[way], runs.Clock(count, warm_up=2))
        losses.setdefault(way, []).extend(clock.losses)
        return {"all": clock.seconds / count}

    with runs.same_batch(trainers[name]), runs.same_batch(trainers["bfloat16, eager"]):
        ways = {way: lambda way=way: turn(way) for way in trainers}
        turns = take_turns(ways, step.scale.rounds)
    seconds = {way: [part["all"] for part in turns[way]] for way in turns}
    step.figure(name, {f"ms, {way}": [1000 * s for s in rows] for way, rows in seconds.items()})
    eager, other = losses["bfloat16, eager"], losses[name]
    finite = all(map(math.isfinite, eager + other))
    step.check(f"{name}: finite", finite, f"{len(other)} losses")
    apart = abs(other[-1] / eager[-1] - 1)
    step.check(f"{name}: learns the same", apart <= SAME, f"losses {apart:.2g} apart")
    trainers.clear()
    if step.cuda:
        torch.cuda.empty_cache()
    found = ratios(seconds["bfloat16, eager"], seconds[name])
    step.figure(f"{name}, times as fast", found)
    return found
