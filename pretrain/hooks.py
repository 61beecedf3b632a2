"""Hooks of the pretraining loop, each with one duty."""

import datetime
import logging
import math
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from pretrain.data.stream import CaptionStream
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.evaluations import RECORD

logger = logging.getLogger(__name__)


class LearningRate(HookBase):
    """Steps the schedule after each iteration and records `lr` and `lr_cnn`."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler):
        self._scheduler = scheduler

    def after_step(self) -> None:
        for group in self._scheduler.optimizer.param_groups:
            key = "lr_cnn" if group["name"].startswith("cnn") else "lr"
            self.trainer.storage.put_scalar(key, group["lr"], smoothing_hint=False)
        self._scheduler.step()


def is_due(trainer: TrainerBase, period: int) -> bool:
    """Whether this iteration is the last one, or ends a period."""
    done = trainer.iter + 1
    return done == trainer.max_iter or (period > 0 and done % period == 0)


class SkippedImages(HookBase):
    """Counts the distinct images that could not be decoded; stops the run when there are too many.

    Args:
        num_images: images of the training set.
        max_share: the fraction of them that may be skipped.
        period: iterations between exchanges among processes.
    """

    def __init__(self, num_images: int, max_share: float, period: int):
        self._max_share = max_share
        self._num_images = num_images
        self._period = max(1, period)
        self._files: set[str] = set()

    def after_step(self) -> None:
        self._files.update(self.trainer.skipped_files)
        if not is_due(self.trainer, self._period):
            return
        self._files = set().union(*comm.all_gather(self._files))
        self.trainer.storage.put_scalar("images_skipped", len(self._files), smoothing_hint=False)
        if len(self._files) > self._max_share * self._num_images:
            first = ", ".join(sorted(self._files)[:10])
            raise InputError(
                f"{len(self._files)} of {self._num_images} training images cannot be decoded, a "
                f"larger share than DATA.MAX_SKIPPED_SHARE {self._max_share}; the first: {first}. "
                "Replace or remove them, or raise DATA.MAX_SKIPPED_SHARE."
            )

    def state_dict(self) -> dict:
        return {"files": sorted(self._files)}

    def load_state_dict(self, state: dict) -> None:
        self._files = set(state["files"])


class SkippedSamples(HookBase):
    """Counts what a stream passes over; stops the run when that is too much of what it gives.

    Args:
        images_per_batch: over all processes.
        held: samples that have been read before the first is given: what is passed over among
            them is reported with the first batches.
        max_share: the fraction of samples that may be skipped; the first thousand are given a
            thousand's allowance.
        period: iterations between exchanges among processes.
    """

    def __init__(self, images_per_batch: int, held: int, max_share: float, period: int):
        self._images_per_batch = images_per_batch
        self._held = held
        self._max_share = max_share
        self._period = max(1, period)
        self._skipped = 0
        self._new: list[str] = []

    def after_step(self) -> None:
        self._new += self.trainer.skipped_files
        if not is_due(self.trainer, self._period):
            return
        new = [name for names in comm.all_gather(self._new) for name in names]
        self._new = []
        self._skipped += len(new)
        self.trainer.storage.put_scalar("images_skipped", self._skipped, smoothing_hint=False)
        given = (self.trainer.iter + 1) * self._images_per_batch
        total = given + self._held + self._skipped
        if self._skipped > self._max_share * max(total, 1000):
            raise InputError(
                f"{self._skipped} of some {total} samples cannot be used, more than "
                f"DATA.MAX_SKIPPED_SHARE {self._max_share} allows; the last: "
                f"{', '.join(new[-10:])}. The log has the reasons. Mend the shards, or raise "
                "DATA.MAX_SKIPPED_SHARE."
            )

    def state_dict(self) -> dict:
        return {"skipped": self._skipped}

    def load_state_dict(self, state: dict) -> None:
        self._skipped = state["skipped"]


class StreamCursors(HookBase):
    """Keeps in the checkpoint how far a stream has been read; comes before the checkpointer.

    Args:
        stream: what is read.
        period: iterations between checkpoints.
    """

    def __init__(self, stream: CaptionStream, period: int):
        self._stream = stream
        self._period = period

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            self._stream.gather(self.trainer.iter + 1)

    def state_dict(self) -> dict:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._stream.load_state_dict(state)


class Validation(HookBase):
    """Evaluates every `period` iterations (0: never) and after the last one.

    Unlike detectron2's `EvalHook` it does the last one inside the last iteration, before the final
    checkpoint is written: a run that is stopped there and resumed validates again.

    Args:
        period: in iterations.
        evaluate: () -> results by name, recorded as "val/<name>"; called in every process.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict[str, float]]):
        self._period = period
        self._evaluate = evaluate

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            start = time.perf_counter()
            for name, value in self._evaluate().items():
                self.trainer.storage.put_scalar(f"val/{name}", value, smoothing_hint=False)
            seconds = time.perf_counter() - start
            self.trainer.storage.put_scalar(RECORD, seconds, smoothing_hint=False)
            comm.synchronize()


class CaptionPictures(HookBase):
    """Draws captions of some validation images into TensorBoard whenever it is validated.

    Args:
        period: of `Validation`.
        draw: () -> (name, (3, H, W) uint8) of each picture; called in the first process alone.
    """

    def __init__(self, period: int, draw: Callable[[], list[tuple[str, np.ndarray]]]):
        self._period = period
        self._draw = draw

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            for name, picture in self._draw():
                self.trainer.storage.put_image(name, picture)


class BestCheckpoint(HookBase):
    """Keeps the model whose validation was best so far. Stands behind `Validation`.

    Args:
        metric: a recorded value, "val/loss"; the lowest is the best.
        keep: (iterations done) -> None, writes the model; called in every process.
    """

    def __init__(self, metric: str, keep: Callable[[int], None]):
        self._metric = metric
        self._keep = keep
        self._best = math.inf
        self._best_iteration = -1

    def after_step(self) -> None:
        value, when = self.trainer.storage.latest().get(self._metric, (math.inf, -1))
        if when == self.trainer.iter and value < self._best:
            self._best, self._best_iteration = value, self.trainer.iter + 1
            self._keep(self._best_iteration)
            logger.info("Best %s so far: %.4g; kept as model_best.pth.", self._metric, value)

    def state_dict(self) -> dict:
        return {"best": self._best, "iteration": self._best_iteration}

    def load_state_dict(self, state: dict) -> None:
        self._best, self._best_iteration = state["best"], state["iteration"]


class PretrainMetricPrinter(EventWriter):
    """One line of progress: losses, both learning rates, images a second, ETA, peak memory."""

    def __init__(self, max_iter: int, images_per_batch: int, window_size: int = 20):
        self._max_iter = max_iter
        self._images_per_batch = images_per_batch
        self._window_size = window_size

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
        parts += [
            f"{name}: {history.median(self._window_size):.4g}"
            for name, history in histories.items()
            if "loss" in name and "/" not in name
        ]
        parts += [f"{name}: {histories[name].latest():.3g}" for name in ("lr", "lr_cnn")]
        if "time" in histories:
            seconds = histories["time"].median(self._window_size)
            images = self._images_per_batch / seconds
            storage.put_scalar("images_per_second", images, smoothing_hint=False)
            parts.append(f"time: {seconds:.3f}")
            parts.append(f"images/s: {images:.1f}")
        parts.append(f"data_time: {histories['data_time'].avg(self._window_size):.4f}")
        parts.append(f"max_mem: {_peak_memory_mib():.0f}M")
        if histories["images_skipped"].latest() if "images_skipped" in histories else 0:
            parts.append(f"images_skipped: {histories['images_skipped'].latest():.0f}")
        logger.info("  ".join(parts))


def _peak_memory_mib() -> float:
    """Peak memory of the device in MiB; on a CPU the peak resident size of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
