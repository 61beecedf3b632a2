"""A counter of what keeps a host waiting for its device, that needs no device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Numbers or shapes that depend on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item")


class Waits(TorchDispatchMode):
    """Notes every operation that would be waited for if the tensors were on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return function(*args, **(kwargs or {}))
