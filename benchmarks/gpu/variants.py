"""Step 5: whether compiling the backbone pays here, and bfloat16 beside float16, in alternation."""

from benchmarks.rounds import ratios, take_turns

from . import runs
from .step import Step

SAME = 2e-2  # relative, of the losses after a few iterations from equal weights


def run(step: Step) -> None:
    ways = {"float16": "SOLVER.AMP.DTYPE float16", "COMPILE": "MODEL.VISUAL.COMPILE True"}
    if not step.cuda:
        step.instead("float16", "float32")
        step.instead("COMPILE, which takes minutes", "CHANNELS_LAST False")
        ways = {"float32": "SOLVER.AMP.ENABLED False"}
        ways["CHANNELS_LAST False"] = "MODEL.VISUAL.CHANNELS_LAST False"
    told = []
    for name, words in ways.items():
        if not step.late(f"{name} against eager bfloat16", 60 if name == "COMPILE" else 20):
            ratio = _alternate(step, name, words)["median"]
            told.append(f"{name} {ratio:.2f} times as fast")
            # at a fifth of the speed something is emulated, or compiled again at each iteration
            step.limit(f"{name}, speed", ratio, "of bfloat16's", least=0.2, most=5)
    step.headline(", ".join(told) + " as eager bfloat16")


def _alternate(step: Step, name: str, words: str) -> dict[str, float]:
    """How many times as fast as the plain way, by round."""
    (count, warm_up), eager = (10, 2) if step.cuda else (1, 1), "bfloat16, eager"
    trainers = {eager: runs.trainer(step), name: runs.trainer(step, *words.split())}
    losses: dict[str, list[float]] = {way: [] for way in trainers}

    def turn(way: str) -> dict[str, float]:
        clock = runs.train(trainers[way], runs.Clock(count, warm_up))
        losses[way] += clock.losses
        return {"all": clock.seconds / count}

    with runs.same_batch(trainers[eager]), runs.same_batch(trainers[name]):
        turns = take_turns({way: lambda w=way: turn(w) for way in trainers}, step.scale.rounds)
    seconds = {way: [part["all"] for part in turns[way]] for way in turns}
    step.figure(name, {f"ms, {way}": [1000 * s for s in rows] for way, rows in seconds.items()})
    step.finite(name, losses[name])
    apart = abs(losses[name][-1] / losses[eager][-1] - 1)
    step.check(f"{name}: learns the same", apart <= SAME, f"losses {apart:.2g} apart")
    step.free(*trainers.values())
    found = ratios(seconds[eager], seconds[name])
    step.figure(f"{name}, times as fast", found)
    return found
