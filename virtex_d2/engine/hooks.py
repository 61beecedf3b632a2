"""Hooks of every engine, each with one duty: what is recorded, evaluated, kept and given up for.

Those with a state keep it in checkpoints under the name of their class.
"""

import datetime
import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    num_bytes,
    numbered_checkpoints,
)
from virtex_d2.engine.device import release_freed_memory
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path, in_bytes, json_lines

logger = logging.getLogger(__name__)

# Recorded with each evaluation's results: how long it took. Tells that they are complete.
RECORD = "eval_seconds"

# Learning rates that a run may record, in the order of the log.
RATES = ("lr", "lr_cnn", "lr_scales", "lr_backbone")


def is_due(trainer: TrainerBase, period: int, iteration: int | None = None) -> bool:
    """Whether an iteration, by default this one, is the last one, or ends a period (0: none)."""
    done = (trainer.iter if iteration is None else iteration) + 1
    return done == trainer.max_iter or (period > 0 and done % period == 0)


class LearningRate(HookBase):
    """Steps the schedule after each iteration; records the groups' rates.

    `lr_cnn` is of groups named "cnn...", `lr_scales` of "scales...", `lr` of all others.
    """

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler):
        self._scheduler = scheduler

    def after_step(self) -> None:
        for group in self._scheduler.optimizer.param_groups:
            own = [part for part in ("cnn", "scales") if group["name"].startswith(part)]
            key = f"lr_{own[0]}" if own else "lr"
            self.trainer.storage.put_scalar(key, group["lr"], smoothing_hint=False)
        self._scheduler.step()


class SkippedImages(HookBase):
    """Counts the files that training had to do without; stops the run when there are too many.

    Args:
        skipped: () -> files that this process has met, all or the new ones.
        num_images: of the training set.
        max_share: the fraction of them that may be skipped, 0 to 1; `key` of the config has it.
        period: iterations between exchanges among processes, which make them wait.
    """

    def __init__(
        self,
        skipped: Callable[[], Iterable[str]],
        num_images: int,
        max_share: float,
        key: str,
        period: int,
    ):
        self._skipped, self._num_images = skipped, num_images
        self._max_share, self._key = max_share, key
        self._period = max(1, period)
        self._new: list[str] = []
        self._files: set[str] = set()

    def after_step(self) -> None:
        self._new += self._skipped()
        if not is_due(self.trainer, self._period):
            return
        new = [name for names in comm.all_gather(self._new) for name in names]
        self._new = []
        count, total, least = self._count(new)
        self.trainer.storage.put_scalar("images_skipped", count, smoothing_hint=False)
        if count > self._max_share * max(total, least):
            raise InputError(
                f"{count} of {total} training images are unusable, more than the share "
                f"{self._key} {self._max_share} allows; {self._named(new)}. The log has the "
                "reasons. Replace or remove them, or allow a larger share."
            )

    def _count(self, new: list[str]) -> tuple[int, int, int]:
        """Skipped ones, of how many, and of how many at least the share is taken."""
        self._files.update(new)
        return len(self._files), self._num_images, 0

    def _named(self, _: list[str]) -> str:
        return "the first: " + ", ".join(sorted(self._files)[:10])

    def state_dict(self) -> dict:
        return {"files": sorted(self._files)}

    def load_state_dict(self, state: dict) -> None:
        self._files = set(state["files"])


class SkippedSamples(SkippedImages):
    """As `SkippedImages`, for a stream, whose length nobody knows: of what it has given so far.

    The first thousand samples are given a thousand's allowance.

    Args:
        skipped: () -> names of the new ones of this process.
        images_per_batch: over all processes.
        held: samples that have been read before the first is given: what is passed over among
            them is reported with the first batches.
    """

    def __init__(
        self,
        skipped: Callable[[], Iterable[str]],
        images_per_batch: int,
        held: int,
        max_share: float,
        key: str,
        period: int,
    ):
        super().__init__(skipped, 0, max_share, key, period)
        self._images_per_batch, self._held = images_per_batch, held
        self._number = 0

    def _count(self, new: list[str]) -> tuple[int, int, int]:
        self._number += len(new)
        given = (self.trainer.iter + 1) * self._images_per_batch
        return self._number, given + self._held + self._number, 1000

    def _named(self, new: list[str]) -> str:
        return "the last: " + ", ".join(new[-10:])

    def state_dict(self) -> dict:
        return {"skipped": self._number}

    def load_state_dict(self, state: dict) -> None:
        self._number = state["skipped"]


class StreamCursors(HookBase):
    """Keeps in checkpoints how far a stream, with `gather(iterations)` and a state, has been read.

    Stands before the checkpointer, with its period.
    """

    def __init__(self, stream: Any, period: int):
        self._stream, self._period = stream, period

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            self._stream.gather(self.trainer.iter + 1)

    def state_dict(self) -> dict:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._stream.load_state_dict(state)


class Evaluation(hooks.EvalHook):
    """detectron2's, whose last evaluation is part of the last iteration, and which misses none.

    A run that was killed between a checkpoint and the end of the evaluation that follows it does
    that evaluation when it is resumed.

    Args:
        period: in iterations; 0: after the last only.
        evaluate: () -> nested results; called in every process.
        folder: OUTPUT_DIR, whose metrics.json tells what has been evaluated; None where the
            checkpoint is written behind the evaluation, so that none can be missed.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], folder: str | None):
        super().__init__(period, evaluate)
        self._folder = folder

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            start = time.perf_counter()
            self._do_eval()
            release_freed_memory()
            seconds = time.perf_counter() - start
            self.trainer.storage.put_scalar(RECORD, seconds, smoothing_hint=False)

    def after_train(self) -> None:
        """Do nothing: the last evaluation has been done, unless training has failed."""

    def owed(self, iteration: int) -> bool:
        """Whether it is due and not on record."""
        due = self._folder is not None and is_due(self.trainer, self._period, iteration)
        return due and not is_on_record(self._folder, iteration)


class Pictures(HookBase):
    """Puts what `draw` gives, names and (3, H, W) uint8, into TensorBoard. In the first process."""

    def __init__(self, period: int, draw: Callable[[], list[tuple[str, np.ndarray]]]):
        self._period, self._draw = period, draw

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            for name, picture in self._draw():
                self.trainer.storage.put_image(name, picture)


class BestCheckpoint(HookBase):
    """Keeps the model whose validation was best so far. Stands behind `Evaluation`.

    Args:
        metric: a recorded value, "val/loss".
        keep: (iterations done) -> None, writes the model; called in every process.
    """

    def __init__(self, metric: str, keep: Callable[[int], None], highest: bool = False):
        self._metric, self._keep, self._highest = metric, keep, highest
        self._best, self._best_iteration = -math.inf if highest else math.inf, -1

    def after_step(self) -> None:
        value, when = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        better = value > self._best if self._highest else value < self._best
        if when == self.trainer.iter and better:
            self._best, self._best_iteration = value, self.trainer.iter + 1
            self._keep(self._best_iteration)
            logger.info("Best %s so far: %.4g; kept as model_best.pth.", self._metric, value)

    def state_dict(self) -> dict:
        return {"best": self._best, "iteration": self._best_iteration}

    def load_state_dict(self, state: dict) -> None:
        self._best, self._best_iteration = state["best"], state["iteration"]


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's, for checkpointers that write in the background and know what to keep.

    Before the first iteration it says if the disk has too little room for the run's checkpoints.
    An error of a write is raised after the iteration in which it happened, and training ends when
    all is on disk, whether it ends well or not. In the first process alone.
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer | AtomicDetectionCheckpointer,
        period: int,
        optimizer: torch.optim.Optimizer,
    ):
        super().__init__(checkpointer, period)
        self._optimizer = optimizer

    def before_train(self) -> None:
        super().before_train()
        folder = Path(self.checkpointer.save_dir)
        size = num_bytes(self.checkpointer.states()) + _coming_state(self._optimizer)
        count = self.checkpointer.retention.count(
            self.trainer.start_iter, self.trainer.max_iter, self.period
        )
        old = sum(path.stat().st_size for path in numbered_checkpoints(folder).values())
        needed = size * (count + 1)  # and model_final
        if self.checkpointer.retention.last:
            needed -= old  # which give way to new ones
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            logger.warning(
                "OUTPUT_DIR %s has room for %s, and the %d checkpoints to come take some %s, %s "
                "each. Make room, keep fewer (SOLVER.CHECKPOINT_KEEP_LAST) or write fewer "
                "(SOLVER.CHECKPOINT_PERIOD): the run stops where the disk is full.",
                *(folder, in_bytes(free), count + 1, in_bytes(needed), in_bytes(size)),
            )

    def after_step(self) -> None:
        self.checkpointer.writer.check()
        if self.trainer.iter == self.trainer.start_iter:  # the optimizer has its state by now
            self.checkpointer.writer.reserve(self.checkpointer.states())
        super().after_step()

    def after_train(self) -> None:
        ended_by_error = sys.exc_info()[0] is not None
        try:
            self.checkpointer.wait()
        except Exception as error:
            if not ended_by_error:
                raise
            logger.error("%s", error)  # and the first error goes on its way


def _coming_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer's state will take; 0 once it is there."""
    if optimizer.state:
        return 0
    tensors = 2 if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else 0
    return sum(
        parameter.nbytes * (tensors or bool(group.get("momentum")))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


class MetricsWriter(hooks.PeriodicWriter):
    """detectron2's, which also writes at once what an evaluation has found.

    Else a run that is killed before its next period would have evaluated for nothing. What an
    earlier part of the run has recorded after the checkpoint from which this one goes on, it takes
    back before the first iteration, so that each one is on record once.
    """

    def __init__(self, printer: EventWriter, folder: str, period: int):
        super().__init__([printer], period)
        self._folder = folder

    def before_train(self) -> None:
        start, path = self.trainer.start_iter, os.path.join(self._folder, "metrics.json")
        cut_records(path, start)
        self._writers += [JSONWriter(path), TensorboardXWriter(self._folder, purge_step=start)]

    def after_step(self) -> None:
        if self.trainer.storage.latest().get(RECORD, (0.0, -1))[1] != self.trainer.iter:
            super().after_step()
            return
        for writer in self._writers:
            writer.write()


class ProgressPrinter(EventWriter):
    """One line of progress: ETA, losses, learning rates, images a second, peak memory."""

    _WINDOW = 20  # iterations that a number is the median of

    def __init__(self, max_iter: int, images_per_batch: int):
        self._max_iter, self._images_per_batch = max_iter, images_per_batch

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration == self._max_iter:  # the writers' last call, after training
            return
        histories = storage.histories()
        if "lr" not in histories:  # the first iteration failed: what it raised says more
            return
        parts = []
        if "time" in histories:  # not in the first iterations, which warm up
            seconds = histories["time"].median(1000)
            eta = datetime.timedelta(seconds=int(seconds * (self._max_iter - iteration - 1)))
            storage.put_scalar("eta_seconds", eta.total_seconds(), smoothing_hint=False)
            parts.append(f"eta: {eta}")
        parts.append(f"iter: {iteration}")
        losses = [name for name in histories if "loss" in name and "/" not in name]
        parts += [
            f"{name}: {histories[name].median(self._WINDOW):.4g}"
            for name in sorted(losses, key=lambda name: name != "total_loss")  # it is first
        ]
        rates = [name for name in RATES if name in histories]
        parts += [f"{name}: {histories[name].latest():.3g}" for name in rates]
        if "time" in histories:
            seconds = histories["time"].median(self._WINDOW)
            images = self._images_per_batch / seconds
            storage.put_scalar("images_per_second", images, smoothing_hint=False)
            parts += [f"time: {seconds:.3f}", f"images/s: {images:.1f}"]
        parts.append(f"data_time: {histories['data_time'].avg(self._WINDOW):.4f}")
        parts.append(f"max_mem: {_peak_memory_mib():.0f}M")
        if histories["images_skipped"].latest() if "images_skipped" in histories else 0:
            parts.append(f"images_skipped: {histories['images_skipped'].latest():.0f}")
        logger.info("  ".join(parts))


def _peak_memory_mib() -> float:
    """Peak memory of the device in MiB; on a CPU the peak resident size of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


def is_on_record(folder: str, iteration: int) -> bool:
    """Whether OUTPUT_DIR's metrics.json has an evaluation of the iteration; asks the first process.

    To be called in all processes.
    """
    found = False
    path = os.path.join(folder, "metrics.json")
    if comm.is_main_process() and os.path.exists(path):
        records = json_lines(path)
        found = any(r.get("iteration") == iteration and RECORD in r for r in records)
    return comm.all_gather(found)[0]


def cut_records(path: str, start: int) -> None:
    """Take out of a metrics.json, which need not exist, the records from `start` on."""
    if not os.path.exists(path):
        return
    kept = [record for record in json_lines(path) if record.get("iteration", -1) < start]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in kept)
