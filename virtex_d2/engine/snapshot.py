"""A copy of training's state in the CPU's memory, which stays as it is while training goes on."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class Snapshot:
    """Takes copies of states; each one's memory is that of the one before.

        snapshot = Snapshot()
        copied = snapshot.take({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    What shares memory (tied weights) shares it in the copy too, so that a file of the copy has the
    tensors of a file of the state, once each. The memory, as much as the tensors take, is kept for
    the next copy: to get it anew from the system costs several times the copying.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A deep copy with all tensors on the CPU. What an earlier call gave is overwritten."""
        free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        for storage in self._storages:
            free[storage.nbytes()].append(storage)
        copies: dict[int, torch.UntypedStorage] = {}
        memo: dict[int, Any] = {}  # of deepcopy: what it finds here, by identity, it does not copy
        for tensor in tensors_in(state):
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:
                same_size = free[storage.nbytes()]
                own = same_size.pop() if same_size else torch.UntypedStorage(storage.nbytes())
                copies[storage._cdata] = own.copy_(storage)
            memo[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
                copies[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        self._storages = list(copies.values())
        return copy.deepcopy(dict(state), memo)


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def num_bytes(state: Any) -> int:
    """What the tensors of a state take, in bytes; shared memory counts once."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(state)}
    return sum(sizes.values())
