"""Step 2: pretraining by the tool, its checkpoint, --resume; and the variants of the config."""

import shutil
from pathlib import Path

import torch

from benchmarks.measuring import peak_memory

from . import runs
from .numbers import relative
from .step import Step

# On a GPU sums differ from run to run, and 20 iterations enlarge that. Relative: of the validation
# loss, and of the way that the weights have gone since the checkpoint.
LOSS, WEIGHTS = 1e-2, 0.5
SAME = 2e-2  # relative, of first losses of equal weights in another precision or layout


def run(step: Step) -> None:
    _resume(step)
    _variants(step)


def _resume(step: Step) -> None:
    count, half = step.scale.iterations, step.scale.iterations // 2
    words = f"SOLVER.MAX_ITER {count} SOLVER.WARMUP_ITERS {count // 4} SOLVER.CNN_LR 0.02 "
    words += f"SOLVER.BASE_LR {0.005 if step.cuda else 0.1} SOLVER.CHECKPOINT_PERIOD {half} "
    words += "TEST.EVAL_PERIOD 0 TEST.NUM_CAPTIONS 0 LOG_PERIOD 1"
    val = ["DATA.VAL_CAPTIONS", runs.world(step) / "annotations" / "captions_val.json"]
    val += ["DATA.VAL_IMAGES", runs.world(step) / "images" / "val"]
    whole, stopped = step.fresh("whole"), step.fresh("stopped")
    if not runs.tool(step, "pretrain_net.py", *runs.options(step, whole, *words.split(), *val)):
        return
    records = [record for _, record in sorted(runs.metrics(whole).items())]
    losses = step.finite("losses", [runs.loss_of(record) for record in records])
    step.check("the loss falls", losses[-1] < losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}")
    checkpoint = f"model_{half - 1:07d}.pth"
    for name in ("config.yaml", checkpoint):
        shutil.copy(whole / name, stopped / name)
    (stopped / "last_checkpoint").write_text(checkpoint)
    words = runs.options(step, stopped, *words.split(), *val)
    if not runs.tool(step, "pretrain_net.py", "--resume", *words):
        return
    found = runs.metrics(stopped)
    step.check("it goes on where the checkpoint is", min(found) == half, f"at {min(found)}")
    there, here = records[-1]["val/loss"], found[max(found)]["val/loss"]
    apart = abs(here / there - 1)
    step.check("resumed against unstopped, loss", apart <= LOSS, f"{apart:.2g} apart")
    files = (stopped / checkpoint, whole / "model_final.pth", stopped / "model_final.pth")
    before, unstopped, resumed = map(_weights, files)
    apart = relative(resumed - before, unstopped - before)
    told = f"{apart:.2g} of the way apart"
    step.check("resumed against unstopped, weights", apart <= (WEIGHTS if step.cuda else 0), told)
    step.headline(f"validation loss {there:.4f} after {count} iterations, resumed {here:.4f}")


def _weights(path: Path) -> torch.Tensor:
    model = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return torch.cat([value.flatten() for value in model.values() if value.is_floating_point()])


def _variants(step: Step) -> None:
    ways = {
        "as configured": "",
        "RECOMPUTE blocks": "MODEL.VISUAL.RECOMPUTE blocks",
        "float16": "SOLVER.AMP.DTYPE float16",
        "AdamW": "SOLVER.OPTIMIZER adamw SOLVER.CNN_LR 0.001",
        "CHANNELS_LAST False": "MODEL.VISUAL.CHANNELS_LAST False",
    }
    if not step.cuda:
        step.instead("float16", "float32")
        del ways["float16"]
        ways["float32"] = "SOLVER.AMP.ENABLED False"
    first, table = 0.0, {}
    for name, words in ways.items():
        if step.late(name, 15):
            continue
        trainer, clock = runs.trainer(step, *words.split()), runs.Clock(step.scale.rounds)
        with runs.same_batch(trainer):
            memory = peak_memory(lambda t=trainer, c=clock: runs.train(t, c), step.device)
        ms = 1000 * clock.seconds / step.scale.rounds
        table[name] = {"ms": ms, "mib": memory / 2**20, "loss": clock.losses[-1]}
        step.figure("variants", table)
        step.finite(name, clock.losses)
        first = first or clock.losses[0]
        apart = abs(clock.losses[0] / first - 1)
        step.check(f"{name}: the same first loss", apart < SAME, f"{apart:.2g} apart")
        step.free(trainer)
    if {"as configured", "RECOMPUTE blocks"} <= set(table):
        ours, plain = table["RECOMPUTE blocks"], table["as configured"]
        step.limit("RECOMPUTE blocks, memory", ours["mib"] / plain["mib"], "of none's", most=0.9)
        step.figure("RECOMPUTE blocks, seconds against none's", ours["ms"] / plain["ms"])
