"""Batch norm's statistics for evaluation, measured with the weights as they are."""

import logging
from collections.abc import Callable, Iterable

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.stopping import StopRequested, checked

logger = logging.getLogger(__name__)


class PreciseBN(HookBase):
    """Replaces running statistics by those of the present weights on training images.

    As detectron2's hook (Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576), but
    several models get theirs, and training does not notice: images and random numbers are
    functions of (seed, iteration). So a run trains the same weights with and without it, and the
    statistics of a resumed run are those of one that never stopped.

    Args:
        period: every so many iterations, and after the last; 0: after the last only.
        models: name for the log -> model in training mode.
        build_loader: a new, endless loader of training batches.
        num_batches: how many of them are looked at, for each model.
        seed: of the run.
    """

    def __init__(
        self,
        period: int,
        models: dict[str, nn.Module],
        build_loader: Callable[[], Iterable],
        num_batches: int,
        seed: int,
    ):
        self._period = period
        self._models = models
        self._build_loader = build_loader
        self._num_batches = num_batches
        self._seed = seed

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self.update()

    def update(self) -> None:
        """Measure the statistics of every model on the same batches.

        Doing it twice is doing it once: a resumed run may repeat it.

        Raises:
            StopRequested: all processes are to stop; then the statistics are what they were.
        """
        layers = [layer for model in self._models.values() for layer in get_bn_modules(model)]
        before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in layers]
        for layer in layers:
            # detectron2's norms across processes add the difference to what was there, whose
            # rounding depends on that: from zero it is none, and the second time gives the same.
            layer.running_mean.zero_()
            layer.running_var.zero_()
        try:
            self._measure()
        except StopRequested:
            for layer, state in zip(layers, before):
                layer.load_state_dict(state)
            raise
        for layer, state in zip(layers, before):  # it counts the batches of training
            layer.num_batches_tracked.copy_(state["num_batches_tracked"])

    def _measure(self) -> None:
        for name, model in self._models.items():
            layers = len(get_bn_modules(model))
            logger.info(
                "Precise statistics of %d batch norms of %s from %d batches ...",
                layers,
                name,
                self._num_batches,
            )
            # What the heads report is about training iterations: to another storage, and away.
            with own_randomness(self._seed, self.trainer.iter, comm.get_rank()), EventStorage():
                batches = checked(self._build_loader())
                update_bn_stats(model, batches, self._num_batches)
