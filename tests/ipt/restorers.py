"""Checkpoints of networks so small that a test restores with them, and their images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pretrain.methods.ipt.network import IPT, Sizes
from pretrain.methods.ipt.origin import Origin
from pretrain.methods.ipt.tasks import SIX_TASKS, parse_task
from virtex_d2.engine.files import write_safetensors

HEADS = 2


def tiny_network(tasks=SIX_TASKS) -> IPT:
    """One layer, patches of 12 pixels; what it makes of images is about as bright as they are."""
    torch.manual_seed(0)
    scales = tuple(parse_task(task).scale for task in tasks)
    network = IPT(Sizes(scales, features=4, patch=12, layers=1, heads=HEADS)).eval()
    for tail in network.tail:
        nn.init.normal_(tail[1].weight, std=0.01)
    return network


def write_restorer(path: Path, tasks=SIX_TASKS, network: IPT | None = None, **said: object) -> str:
    """A restorer.safetensors; `said` replaces what it says of itself."""
    network = network or tiny_network(tasks)
    origin = Origin(**{"tasks": tuple(tasks), "heads": HEADS, "positions": "once", **said})
    write_safetensors(path, network.state_dict(), origin.metadata())
    return str(path)


def write_images(folder: Path, **sizes: tuple[int, int]) -> Path:
    """Smooth RGB images by name, of these widths and heights, as PNG; "__" stands for "/"."""
    for number, (name, size) in enumerate(sizes.items()):
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(path)
    return folder
