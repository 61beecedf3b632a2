"""One update of the weights, and its numbers, without host and device waiting for each other.

A GPU works off what the host has queued. To read a number back (`.item()`) keeps the host until the
queue is empty, and then the GPU until the host has queued something. So no step does it: numbers
are read when the next step has been queued.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from virtex_d2.engine.checkpointer import has_checkpoint
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.randomness import place_seed

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]


class UpdateLoop:
    """Batch, losses and gradients in any number of passes, clipping, optimizer.

    The samples of an update are split into passes of equally many, each pass's loss divided by
    their number, the gradients summed. That is the gradient of as many times more processes: a
    mean over images is the same as of all at once; a mean over objects (masks) is one of each
    pass's means, as on several GPUs. Norms see the images of a pass.

    What an iteration draws (dropout, proposals to learn from) is a function of (seed, iteration,
    rank): a resumed run draws what it would have drawn. An update whose losses or gradients are not
    finite ends the run (with a scaler, only the losses): its gradients reach no weight, and no
    checkpoint is written before its numbers have been looked at.

    Args:
        model: in training mode; a batch, or a pass's part of one -> losses by name.
        optimizer: of its parameters.
        batches: first iteration -> endless batches of this process from there on.
        seed: of the run.
        prepare: a batch as loaded -> as the model takes it; outside of autocast.
        passes: how many forward and backward passes a batch takes.
        split: (batch, passes) -> its parts, of equally many samples; a batch is a list by default.
        dtype: of autocast; None without.
        scaler: multiplies the loss against underflow; for float16.
        max_norm: the norm of all gradients together is clipped at this; None: not at all. What
            detectron2's optimizers clip (each parameter alone) they clip in their step.
        norm_type: the p of that p-norm.
        parameters: whose norm it is, in the order of its sum; None: the optimizer's.
        folder: OUTPUT_DIR, for the error of losses that are not finite.
        advice: what to do about them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[int], Iterable],
        *,
        seed: int = 0,
        prepare: Callable[[Any], Any] | None = None,
        passes: int = 1,
        split: Callable[[Any, int], Iterable] | None = None,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        parameters: Iterable[nn.Parameter] | None = None,
        folder: str = "",
        advice: str = "lower SOLVER.BASE_LR",
    ):
        self.model, self.optimizer = model, optimizer
        self._batches, self._iterator = batches, None
        self._seed, self._prepare = seed, prepare
        self._passes, self._split, self._dtype = passes, split or _slices, dtype
        self._device_type = next(model.parameters()).device.type
        self.grad_scaler = scaler or torch.amp.GradScaler(self._device_type, enabled=False)
        self._max_norm = math.inf if max_norm is None else max_norm
        self._norm_type = norm_type
        groups = optimizer.param_groups
        self._parameters = list(parameters or (p for group in groups for p in group["params"]))
        self._folder, self._advice = folder, advice
        self._readings = Readings(self._check)

    def start_at(self, iteration: int) -> None:
        """Let the next step take the batch of this iteration."""
        self.model.train()
        self._iterator = iter(self._batches(iteration))

    def step(self, iteration: int) -> None:
        """Update the weights once."""
        assert self.model.training, "the model was left in evaluation mode"
        if self._iterator is None:
            self.start_at(iteration)
        start = time.perf_counter()
        batch = next(self._iterator)
        data_time = time.perf_counter() - start
        torch.manual_seed(place_seed(self._seed, iteration, comm.get_rank()))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._accumulate_gradients(batch)
        # before the optimizer's own clipping, which must not see the scale
        self.grad_scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm, self._norm_type)
        if self.grad_scaler.is_enabled():
            self.grad_scaler.step(self.optimizer)  # left out where gradients are not finite
            self.grad_scaler.update()
        else:
            step_where_finite(self.optimizer, norm)
        self._readings.take(iteration, data_time, {**losses, "grad_norm": norm})

    def losses(self, part: Any) -> Losses:
        """The model's losses of a batch as it is loaded, in the precision of training."""
        if self._prepare is not None:
            part = self._prepare(part)
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None):
            return self.model(part)

    def record(self, storage: EventStorage) -> None:
        """Look at the numbers of all updates so far, and write them down. In all processes."""
        self._readings.record(storage)
        if self.grad_scaler.is_enabled():
            storage.put_scalar("grad_scale", self.grad_scaler.get_scale())

    def _accumulate_gradients(self, batch: Any) -> Losses:
        """Leave the gradients in the parameters; return the means of the losses."""
        if self._passes == 1:
            losses = self.losses(batch)
            self.grad_scaler.scale(sum(losses.values())).backward()
            return losses
        mean: Losses = {}
        for number, part in enumerate(self._split(batch, self._passes)):
            with self._synchronised(number == self._passes - 1):
                losses = self.losses(part)
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

    def _check(self, iteration: int, numbers: dict[str, float]) -> None:
        scaled = self.grad_scaler.is_enabled()
        looked_at = [v for name, v in numbers.items() if not (scaled and name == "grad_norm")]
        if all(map(math.isfinite, looked_at)):
            return
        found = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        kept = f"The last checkpoint in {self._folder} is from before"
        kept = kept if has_checkpoint(self._folder) else f"{self._folder} has no checkpoint yet"
        raise InputError(
            f"Losses or gradients are not finite at iteration {iteration}: {found}. {kept}: "
            f"{self._advice}."
        )

    def state_dict(self) -> dict:
        """Optimizer and, where it is used, the scaler (as detectron2's `AMPTrainer` names it)."""
        state = {"optimizer": self.optimizer.state_dict()}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if "grad_scaler" in state and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        elif self.grad_scaler.is_enabled():
            logger.warning(
                "The checkpoint was not trained in float16: the scale of the loss starts anew."
            )


def _slices(batch: list, passes: int) -> list[list]:
    size = len(batch) // passes
    return [batch[number * size : (number + 1) * size] for number in range(passes)]


def share_of(images: int, or_else: str = "") -> int:
    """How many of SOLVER.IMS_PER_BATCH images are this process's; refused where they differ."""
    processes = comm.get_world_size()
    if images % processes:
        near = {max(images // processes, 1) * processes, -(-images // processes) * processes}
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes cannot share equally. "
            "Start another number of processes, set it to "
            f"{' or '.join(map(str, sorted(near)))}{or_else}."
        )
    return images // processes


def step_where_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Update the weights, or if the norm is not finite leave them and all state as they are.

    Args:
        optimizer: a fused one decides on the device; for others the host waits.
        norm: scalar, of all gradients.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~norm.isfinite()).float()  # as GradScaler tells it
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()


class Readings:
    """Losses and norms of iterations, from the device to the `EventStorage` of the trainer.

        readings.take(iteration, data_time, {"loss_a": tensor, "grad_norm": tensor})
        readings.record(storage)   # now and then, before anything that reads or writes it down

    Args:
        check: called with the iteration and its numbers by name, in each process with its own, when
            the next one has been taken or all are recorded.
    """

    def __init__(self, check: Callable[[int, dict[str, float]], None]):
        self._check = check
        self._coming: Callable[[], dict[str, float]] | None = None
        self._read: list[dict[str, float]] = []

    def take(self, iteration: int, data_time: float, values: Losses) -> None:
        """Queue the copy of an iteration's scalars; wait for those of the one before."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        event = None
        if stacked.is_cuda:
            stacked = torch.empty(len(values), dtype=stacked.dtype, pin_memory=True).copy_(
                stacked, non_blocking=True
            )
            event = torch.cuda.current_stream().record_event()

        def arrived() -> dict[str, float]:
            if event is not None:
                event.synchronize()
            numbers = dict(zip(values, stacked.tolist()))
            self._check(iteration, numbers)
            return {"iteration": iteration, "data_time": data_time, **numbers}

        self._settle()
        self._coming = arrived

    def record(self, storage: EventStorage) -> None:
        """Write down all that was taken, means over processes; to be called in all of them.

        `data_time` is the largest of the processes', `total_loss` the sum of the losses.
        """
        self._settle()
        of_processes = comm.gather(self._read)
        self._read = []
        if not comm.is_main_process():
            return
        now = storage.iter
        for together in zip(*of_processes):
            mean = {name: float(np.mean([own[name] for own in together])) for name in together[0]}
            storage.iter = mean.pop("iteration")
            mean["data_time"] = max(own["data_time"] for own in together)
            losses = [v for name, v in mean.items() if name not in ("data_time", "grad_norm")]
            storage.put_scalars(**{**mean, "total_loss": sum(losses)})
        storage.iter = now

    def _settle(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._read.append(coming())
