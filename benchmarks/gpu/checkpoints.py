"""Step 9: what a checkpoint in the background costs training, and a stop by USR1."""

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from virtex_d2.engine.checkpointer import StateWriter, num_bytes
from virtex_d2.engine.unfinished import EXIT_UNFINISHED

from . import runs
from .step import Step

STALL = 3.0  # seconds: a copy of some GB into the CPU's memory, the first into new memory


def run(step: Step) -> None:
    if not step.late("a checkpoint in the background", 20):
        _background(step)
    if not step.late("a stop by USR1", 30):
        _stop(step)


def _background(step: Step) -> None:
    every = 10 if step.cuda else 2
    trainer = runs.trainer(step, "SOLVER.CHECKPOINT_PERIOD", every)
    count = 4 * every
    clock = runs.Clock(count, warm_up=every - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with runs.same_batch(trainer):
        runs.train(trainer, clock)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    stamps = [second - first for first, second in zip(clock.stamps, clock.stamps[1:])]
    # the snapshot is taken at the end of every `every`-th iteration; the others write or not
    saving, others = stamps[::every], [s for i, s in enumerate(stamps) if i % every]
    usual = statistics.median(others)
    size = num_bytes(trainer.checkpointer.states())
    start = time.perf_counter()
    trainer.checkpointer.wait()
    waited = time.perf_counter() - start
    start = time.perf_counter()
    trainer.checkpointer.writer = StateWriter(background=False)
    trainer.checkpointer.save("in_place")
    in_place = time.perf_counter() - start
    step.figure(
        "background",
        {
            "bytes": size,
            "ms, usual": 1000 * usual,
            "ms, with a snapshot": [1000 * s for s in saving],
            "ms, slowest other": 1000 * max(others),
            "s, in place": in_place,
            "s, waited at the end": waited,
            "memory grown, of a checkpoint": grown / size,
        },
    )
    step.limit("training waits", max(saving[1:]) - usual, "s", most=STALL)
    step.limit("against in place", (max(saving[1:]) - usual) / in_place, "of its time", most=0.7)
    step.limit("while it is written", statistics.mean(others) / usual, "times as long", most=1.5)
    step.limit("memory", grown / size, "checkpoints more in the CPU's", most=4)
    last = sorted((step.folder / step.name / "trainer").glob("model_*.pth"))[-1]
    model = torch.load(last, map_location="cpu", weights_only=True)["model"]
    finite = all(bool(v.isfinite().all()) for v in model.values() if v.is_floating_point())
    step.check("what is written is whole", finite and len(model) > 0, f"{last.name} of {size:,} B")
    step.headline(f"{size / 1e9:.2f} GB: {max(saving) - usual:.2f} s of waiting, "
                  f"in place {in_place:.2f} s")  # fmt: skip


def _stop(step: Step) -> None:
    """USR1 in the middle of a run: a checkpoint, exit code 75, and --resume ends it."""
    folder = step.fresh("stop")
    options = runs.options(step, folder, *["SOLVER.WARMUP_ITERS", "1", "LOG_PERIOD", "1"])
    command = [sys.executable, str(runs.ROOT / "tools" / "pretrain_net.py"), *options]
    process = subprocess.Popen([*command, "SOLVER.MAX_ITER", "100000"], cwd=runs.ROOT)
    try:
        while process.poll() is None and not _has_begun(folder):
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGUSR1)
        start = time.perf_counter()
        code = process.wait(max(1.0, step.left - 5))
    except (subprocess.TimeoutExpired, ProcessLookupError):
        code = process.poll()
    finally:
        process.kill()
    seconds = time.perf_counter() - start
    told = f"exit code {code} after {seconds:.1f} s"
    step.check("USR1 ends it with exit code 75", code == EXIT_UNFINISHED, told)
    last = folder / "last_checkpoint"
    step.check("with a checkpoint", last.is_file(), last.read_text() if last.is_file() else "none")


def _has_begun(folder: Path) -> bool:
    metrics = folder / "metrics.json"
    return metrics.is_file() and metrics.stat().st_size > 0
