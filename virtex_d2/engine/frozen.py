"""Networks that are to stay as they are, and proof that they did."""

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module) -> str:
    """Hash every parameter and buffer (SHA-256): name, type, shape and bytes.

    A third of a second for a ResNet-50. Running statistics are buffers, so that a network that was
    merely run in training mode has another one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_untouched(network: nn.Module, before: str) -> None:
    """Fail where a network that was to be frozen has changed.

    Raises:
        RuntimeError: its `fingerprint` is not `before`; what was computed with it is worth nothing.
    """
    if fingerprint(network) != before:
        raise RuntimeError(
            "the frozen network has changed: weights or norm statistics differ from those that "
            "were loaded. This is a mistake in the program; the result is withheld."
        )
