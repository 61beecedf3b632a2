"""Copies to the device that the host does not wait for."""

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the copy is queued, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # itself where it is pinned
    return tensor.to(device, non_blocking=True)
