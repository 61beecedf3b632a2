"""Small hooks of fine-tuning, each with one duty."""

import time
from collections.abc import Callable

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.evaluations import RECORD, is_on_record
from virtex_d2.engine.randomness import place_seed


class ImagesPerSecond(HookBase):
    """Writes `images_per_second` of all processes together; stands after `IterationTimer`.

    Args:
        images: of an iteration.
    """

    def __init__(self, images: int):
        self._images = images

    def after_step(self) -> None:
        time = self.trainer.storage.histories().get("time")
        if time is not None:  # the timer leaves the first iterations out
            self.trainer.storage.put_scalar("images_per_second", self._images / time.latest())


class SeedIteration(HookBase):
    """What an iteration draws (proposals to learn from) is a function of (seed, iteration, rank).

    So that a resumed run draws what it would have drawn, and no generator's state need be kept.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def before_step(self) -> None:
        torch.manual_seed(place_seed(self._seed, self.trainer.iter, comm.get_rank()))


class Evaluation(hooks.EvalHook):
    """detectron2's, whose last evaluation is part of the last iteration, and which misses none.

    A run that was killed between a checkpoint and the end of the evaluation that follows it does
    that evaluation when it is resumed.

    Args:
        period: in iterations; 0: after the last only.
        evaluate: () -> nested results; called in every process.
        folder: OUTPUT_DIR, whose metrics.json tells what has been evaluated.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], folder: str):
        super().__init__(period, evaluate)
        self._folder = folder

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter):
            start = time.perf_counter()
            self._do_eval()
            self.trainer.storage.put_scalar(
                RECORD, time.perf_counter() - start, smoothing_hint=False
            )

    def after_train(self) -> None:
        """Nothing: the last evaluation has been done, unless training has failed."""

    def owed(self, iteration: int) -> bool:
        """Whether it is due and not on record."""
        return self._is_due(iteration) and not is_on_record(self._folder, iteration)

    def _is_due(self, iteration: int) -> bool:
        done = iteration + 1
        return done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0)


class SkippedImages(HookBase):
    """Counts the files that training had to do without, and stops the run at too many of them.

    Writes `images_skipped` to the metrics.

    Args:
        max_share: the fraction of the data set's images that may be skipped, 0 to 1.
        period: iterations between exchanges among processes, which make them wait.
    """

    def __init__(self, max_share: float, period: int):
        self._max_share = max_share
        self._period = period

    def after_step(self) -> None:
        period = 1 if comm.get_world_size() == 1 else self._period
        iteration = self.trainer.iter + 1
        if iteration % period and iteration != self.trainer.max_iter:
            return
        loader = self.trainer.data_loader
        skipped = sorted(set().union(*comm.all_gather(loader.skipped)))
        self.trainer.storage.put_scalar("images_skipped", len(skipped), smoothing_hint=False)
        total = len(loader.training_set)
        if len(skipped) > self._max_share * total:
            raise InputError(
                f"{len(skipped)} of {total} training images are unusable, more than the share "
                f"VIRTEX.MAX_SKIPPED_SHARE {self._max_share} allows; the first: "
                f"{', '.join(skipped[:10])}. Replace or remove them, or allow a larger share."
            )
