"""The training loop: one iteration is one optimizer update, in any number of passes."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from virtex_d2.detection.options import autocast_dtype, clips_full_model
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


class UpdateLoop(SimpleTrainer):
    """detectron2's loop with gradient accumulation and mixed precision, on any device.

    detectron2's `AMPTrainer` knows neither accumulation nor CPUs nor bfloat16.

    The images of an update are split into passes of equally many, each pass's loss divided by
    their number, the gradients summed. That is the gradient of as many times more processes: a
    mean over images is the same as of all at once; a mean over objects (masks) is one of each
    pass's means, as on several GPUs. Norms see the images of a pass.

    Args:
        model, data_loader, optimizer: of `SimpleTrainer`; a batch has the images of an update that
            are this process's.
        passes: how many forward and backward passes the images of a batch take.
        dtype: of autocast; None without.
        scaler: multiplies the loss against underflow; for float16.
        max_norm: the norm of all gradients together is clipped at this; None: not at all. What
            detectron2's optimizers clip (each parameter alone) they clip in their step.
        norm_type: the p of that p-norm.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        super().__init__(model, data_loader, optimizer)
        self._passes = passes
        self._dtype = dtype
        self._device_type = next(model.parameters()).device.type
        self.grad_scaler = scaler or torch.amp.GradScaler(self._device_type, enabled=False)
        self._max_norm, self._norm_type = max_norm, norm_type

    def run_step(self) -> None:
        """One update: batch, losses and gradients pass by pass, clipping, optimizer."""
        assert self.model.training, "the model was left in evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses = self._accumulate_gradients(batch)
        self._write_metrics(losses, data_time)
        self._clip_all()
        # Unscales the gradients if that has not been done, before it calls the optimizer, which
        # may clip them in its step; leaves the step out where they are not finite.
        self.grad_scaler.step(self.optimizer)
        if self.grad_scaler.is_enabled():
            get_event_storage().put_scalar("grad_scale", self.grad_scaler.get_scale())
        self.grad_scaler.update()

    def _accumulate_gradients(self, batch: list) -> dict[str, torch.Tensor]:
        """Leaves the gradients in the parameters; returns the means of the losses."""
        size = len(batch) // self._passes
        mean: dict[str, torch.Tensor] = {}
        for number in range(self._passes):
            part = batch[number * size : (number + 1) * size]
            with self._synchronised(number == self._passes - 1):
                with torch.autocast(
                    self._device_type, self._dtype, enabled=self._dtype is not None
                ):
                    losses = self.model(part)
                    total = sum(losses.values())
                self.grad_scaler.scale(total / self._passes).backward()
            for name, loss in losses.items():
                mean[name] = mean.get(name, 0) + loss.detach() / self._passes
        return mean

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange their sums once, with the last pass."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _clip_all(self) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        max_norm = math.inf if self._max_norm is None else self._max_norm
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, self._norm_type).item()
        storage = get_event_storage()
        if self._max_norm is not None:
            storage.put_scalar("grad_norm", norm)
        if not math.isfinite(norm) and not self.grad_scaler.is_enabled():
            raise InputError(
                f"The norm of the gradients is {norm} at iteration {storage.iter}, though the loss "
                "is finite. Checkpoints are from before: lower SOLVER.BASE_LR, lengthen "
                "SOLVER.WARMUP_ITERS, or compute in float32 (SOLVER.AMP.ENABLED False)."
            )

    def state_dict(self) -> dict:
        """Optimizer and, where it is used, the scaler (as `AMPTrainer` names it)."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        elif self.grad_scaler.is_enabled():
            logger.warning(
                "The checkpoint was not trained in float16: the scale of the loss starts anew."
            )


def build_loop(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
) -> UpdateLoop:
    """The loop that SOLVER.AMP, SOLVER.CLIP_GRADIENTS and VIRTEX.ACCUMULATE describe."""
    dtype = autocast_dtype(cfg)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return UpdateLoop(
        model,
        data_loader,
        optimizer,
        passes=cfg.VIRTEX.ACCUMULATE,
        dtype=dtype,
        # bfloat16 has float32's range: nothing underflows that float32 would keep.
        scaler=torch.amp.GradScaler("cuda") if dtype == torch.float16 else None,
        max_norm=clip.CLIP_VALUE if clips_full_model(cfg) else None,
        norm_type=clip.NORM_TYPE,
    )
