"""An exponential moving average of the weights, beside those that are trained."""

import copy
import itertools
import logging
import os

import torch
from detectron2.engine import HookBase
from torch import nn

from virtex_d2.detection.checkpointer import DetectorCheckpointer

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
        """What `state_dict` gave, of the same model.

        Raises:
            RuntimeError: of `Module.load_state_dict`: it is of another model.
        """
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
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._checkpointer.save_beside("model_ema", iteration=self.trainer.iter, is_ema=True)

    def owed(self, iteration: int) -> bool:
        """Whether a run was killed between its last checkpoint and this file."""
        path = os.path.join(self._checkpointer.save_dir, "model_ema.pth")
        return iteration + 1 == self.trainer.max_iter and not os.path.exists(path)
