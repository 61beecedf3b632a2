"""Step 2: pretraining by the tool, its checkpoint, --resume; and the variants of the config."""

import math
import shutil
from pathlib import Path

import torch

from benchmarks.measuring import peak_memory

from . import runs
from .step import Step

# On a GPU sums differ from run to run, and 20 iterations enlarge that. Relative: of the loss, a
# median over 20 iterations, and of the way that the weights have gone since the checkpoint.
LOSS, WEIGHTS = 1e-2, 0.3
SAME = 2e-2  # relative, of first losses of equal weights in another precision or layout


def run(step: Step) -> None:
    _resume(step)
    _variants(step)


def _resume(step: Step) -> None:
    count = step.scale.iterations
    half = count // 2
    schedule = ("SOLVER.MAX_ITER", count, "SOLVER.WARMUP_ITERS", count // 4)
    schedule += ("SOLVER.CNN_LR", 0.02, "SOLVER.BASE_LR", 0.005 if step.cuda else 0.1)
    schedule += ("SOLVER.CHECKPOINT_PERIOD", half)
    whole, stopped = step.folder / "whole", step.folder / "stopped"
    for folder in (whole, stopped):
        shutil.rmtree(folder, ignore_errors=True)
    code = runs.run_tool("pretrain_net.py", *runs.pretrain_options(step, whole, *schedule))
    step.check(f"{count} iterations", code == 0, f"exit code {code}")
    if code:
        return
    shutil.copy(whole / "tokenizer.model", step.folder / "tokenizer.model")
    losses = [runs.loss_of(record) for _, record in sorted(runs.metrics(whole).items())]
    step.check("losses are finite", all(map(math.isfinite, losses)), f"{len(losses)} of them")
    step.check("the loss falls", losses[-1] < losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}")
    for name in ("model_final.pth", "backbone.safetensors"):
        step.check(f"{name} is written", (whole / name).is_file())
    stopped.mkdir()
    checkpoint = f"model_{half - 1:07d}.pth"
    for name in ("config.yaml", "tokenizer.model", checkpoint):
        shutil.copy(whole / name, stopped / name)
    (stopped / "last_checkpoint").write_text(checkpoint)
    options = runs.pretrain_options(step, stopped, *schedule)
    code = runs.run_tool("pretrain_net.py", "--resume", *options)
    step.check("--resume", code == 0, f"exit code {code}")
    if code:
        return
    found = runs.metrics(stopped)
    step.check("it goes on where the checkpoint is", min(found) == half, f"at {min(found)}")
    last = runs.loss_of(found[max(found)])
    apart = abs(last / losses[-1] - 1)
    step.check("resumed against unstopped, loss", apart <= LOSS, f"{apart:.2g} apart")
    before, there, here = (
        _weights(path)
        for path in (stopped / checkpoint, whole / "model_final.pth", stopped / "model_final.pth")
    )
    apart = ((here - there).norm() / (there - before).norm()).item()
    within = apart <= (WEIGHTS if step.cuda else 0)
    step.check("resumed against unstopped, weights", within, f"{apart:.2g} of the way apart")
    step.headline(f"loss {losses[-1]:.3f} after {count} iterations, resumed {last:.3f}")


def _weights(path: Path) -> torch.Tensor:
    model = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return torch.cat([value.flatten() for value in model.values() if value.is_floating_point()])


def _variants(step: Step) -> None:
    norms = ("MODEL.VISUAL.RECOMPUTE", "norms")
    ways = {
        "as configured": (),
        "RECOMPUTE norms": norms,
        "float16": ("SOLVER.AMP.DTYPE", "float16"),
        "AdamW": ("SOLVER.OPTIMIZER", "adamw", "SOLVER.CNN_LR", 1e-3),
        "CHANNELS_LAST False": ("MODEL.VISUAL.CHANNELS_LAST", False),
    }
    if not step.cuda:
        step.instead("float16", "float32")
        ways["float32"] = ("SOLVER.AMP.ENABLED", False)
        del ways["float16"]
    first, table = math.nan, {}
    for name, options in ways.items():
        if step.late(name, 15):
            continue
        clock, memory = _train(step, step.folder / "variant", options)
        table[name] = {
            "ms": 1000 * clock.seconds / step.scale.rounds,
            "mib": memory / 2**20,
            "loss": clock.losses[-1],
        }
        finite = all(map(math.isfinite, clock.losses))
        step.check(f"{name}: finite", finite, f"{clock.losses[0]:.4f} to {clock.losses[-1]:.4f}")
        if not options:
            first = clock.losses[0]
        apart = abs(clock.losses[0] / first - 1)
        step.check(f"{name}: the same first loss", apart < SAME, f"{apart:.2g} apart")
    step.figure("variants", table)
    if {"as configured", "RECOMPUTE norms"} <= set(table):
        ours, plain = table["RECOMPUTE norms"], table["as configured"]
        step.limit("RECOMPUTE norms, memory", ours["mib"] / plain["mib"], "of none's", most=0.99)
        step.figure("RECOMPUTE norms, seconds against none's", ours["ms"] / plain["ms"])


def _train(step: Step, folder: Path, options: tuple) -> tuple[runs.Clock, int]:
    shutil.rmtree(folder, ignore_errors=True)
    trainer = runs.build_trainer(step, folder.name, *options)
    clock = runs.Clock(step.scale.rounds)
    with runs.same_batch(trainer):
        memory = peak_memory(lambda: runs.train(trainer, clock), step.device)
    del trainer
    if step.cuda:
        torch.cuda.empty_cache()
    return clock, memory
