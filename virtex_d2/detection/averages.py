"""Networks to evaluate beside the one that is trained: averaged weights, precise statistics."""

import copy
import itertools
import logging
import os
from collections.abc import Callable, Iterable

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.engine.hooks import is_due
from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.stopping import StopRequested, checked

logger = logging.getLogger(__name__)


class WeightEMA:
    """The average of a model's weights over its updates.

    After the n-th update (n > 1) average += (1 - d) * (weights - average), where
    d = min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage: until
    `decay` applies, the average spans about the last ninth of the updates. The first one is a copy.
    Running statistics of norms are averaged like weights, counters are copied. (torch's
    `AveragedModel` does the same and counts on the device, which keeps the host waiting.)

    Args:
        model: not wrapped in DistributedDataParallel.
        decay: between 0 and 1; the average spans some 1 / (1 - decay) updates.

    Attributes:
        model: the network with the averaged weights.
        updates: how many updates of the weights have been averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one more update of the optimizer."""
        self.updates += 1
        n = self.updates
        own, theirs = (itertools.chain(of.parameters(), of.buffers()) for of in (self.model, model))
        pairs = list(zip(own, theirs, strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and n > 1]
        copied = [pair for pair in pairs if not (pair[0].is_floating_point() and n > 1)]
        if averaged:
            weight = 1 - min(self._decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(*map(list, zip(*averaged)), weight)
        if copied:  # counters of batches; all in the first update
            torch._foreach_copy_(*map(list, zip(*copied)))

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


class UpdateEMA(HookBase):
    """Takes every iteration's weights into the average."""

    def __init__(self, ema: WeightEMA):
        self._ema = ema

    def before_train(self) -> None:
        if self.trainer.start_iter and not self._ema.updates:
            logger.warning(
                "VIRTEX.EMA: the checkpoint holds no average, which starts with iteration %d.",
                self.trainer.start_iter,
            )

    def after_step(self) -> None:
        model = self.trainer.model
        self._ema.update(getattr(model, "module", model))


class ExportEMA(HookBase):
    """Writes OUTPUT_DIR/model_ema.pth after the last iteration: the average as a plain detector.

    For detectron2 and tools that read `model` of a checkpoint, which elsewhere are the weights
    that training goes on from. In the first process alone.
    """

    def __init__(self, checkpointer: DetectorCheckpointer):
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        if is_due(self.trainer, 0):
            self._checkpointer.save_beside("model_ema", iteration=self.trainer.iter, is_ema=True)

    def owed(self, iteration: int) -> bool:
        """Whether a run was killed between its last checkpoint and this file."""
        path = os.path.join(self._checkpointer.save_dir, "model_ema.pth")
        return is_due(self.trainer, 0, iteration) and not os.path.exists(path)


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
        self._period, self._models, self._seed = period, models, seed
        self._build_loader, self._num_batches = build_loader, num_batches

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
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
                *(layers, name, self._num_batches),
            )
            # What the heads report is about training iterations: to another storage, and away.
            with own_randomness(self._seed, self.trainer.iter, comm.get_rank()), EventStorage():
                batches = checked(self._build_loader())
                update_bn_stats(model, batches, self._num_batches)
