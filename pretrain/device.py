"""Between host and device without either waiting for the other.

A GPU works off what the host has queued. To read a number back (`.item()`), or to copy from memory
that is not pinned, keeps the host until the queue is empty, and then the GPU until the host has
queued something. So nothing of a training step does either: numbers are read when the next step has
been queued.
"""

from collections.abc import Callable

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the copy is queued, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # itself where it is pinned
    return tensor.to(device, non_blocking=True)


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

    def take(self, iteration: int, data_time: float, values: dict[str, torch.Tensor]) -> None:
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
            losses = [value for name, value in mean.items() if name.startswith("loss")]
            storage.put_scalars(**mean, total_loss=sum(losses))
        storage.iter = now

    def _settle(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._read.append(coming())
