"""Make of clean images what a task restores: smaller, noisy or rainy ones, on the images' device.

IPT (arXiv 2012.00364, section 3.2 and 4.1). All that is random follows from a seed for each image:
not from what else is in the batch, nor from the number of processes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pretrain.methods.ipt.tasks import Task

# Pixels of the smaller image that MATLAB's imresize mirrors at a border; two are enough for the
# kernel, and torch's own treatment of the border stays outside of the other two.
_MIRRORED = 4

# Rain as this project draws it, between light and heavy; the datasets' streaks were rendered with
# Photoshop, whose settings nobody has written down.
_DENSITY = 0.001, 0.006  # drops a pixel
_ANGLE = 25.0  # degrees at most from the vertical
_LENGTH = 8.0, 24.0  # pixels of a streak
_WIDTH = 0.4, 0.9  # pixels, standard deviation across it
_BRIGHT = 50.0, 140.0  # levels that it adds
_KERNEL = 31  # pixels, odd and longer than a streak


def degrade(
    clean: torch.Tensor,
    task: Task,
    seeds: Sequence[int],
    streaks: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 3, H / scale, W / scale), both float32 RGB on the scale 0-255.

    Enlarging begins from whole levels, as in files of small images; noise is clipped and not
    rounded.

    Args:
        clean: its sides are multiples of the scale.
        task: says what is done.
        seeds: of each image, not negative, for noise and streaks.
        streaks: (N, 1, H, W) levels of rain, in place of those that are drawn here.
    """
    if task.scale > 1:
        clean = resize(clean, 1 / task.scale).round_().clamp_(0, 255)
    if task.sigma:
        noise = torch.stack([_normal(clean.shape[1:], s, clean.device) for s in seeds])
        clean = (clean + task.sigma * noise).clamp_(0, 255)
    if task.rain:
        rain = draw_streaks(clean.shape[2:], seeds, clean.device) if streaks is None else streaks
        clean = (clean + rain).clamp_(0, 255)
    return clean


def resize(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Bicubic, antialiased where it shrinks, mirrored at the border: as MATLAB's imresize.

    Args:
        images: (N, C, H, W) float.
        factor: a whole number, or 1 over one.

    Raises:
        ValueError: the sides cannot be divided.
    """
    step = round(max(factor, 1 / factor))
    height, width = images.shape[2:]
    if factor < 1 and (height % step or width % step):
        raise ValueError(f"{width}x{height} pixels do not divide by {step}")
    # so many of the larger image make a whole number of the smaller one's
    border = _MIRRORED * step if factor < 1 else _MIRRORED
    rows, columns = (_mirrored(n, border, images.device) for n in (height, width))
    padded = images[:, :, rows][:, :, :, columns]
    size = [side * step if factor > 1 else side // step for side in padded.shape[2:]]
    cut = _MIRRORED if factor < 1 else _MIRRORED * step
    # antialias also makes the kernel the one of a = -0.5, where torch has -0.75 without
    resized = F.interpolate(padded, size, mode="bicubic", antialias=True)
    return resized[:, :, cut:-cut, cut:-cut]


def _mirrored(length: int, border: int, device: torch.device) -> torch.Tensor:
    """Indices from -border to length + border, the outermost pixel repeated first."""
    index = torch.arange(-border, length + border, device=device) % (2 * length)
    return torch.minimum(index, 2 * length - 1 - index)


def draw_streaks(size: Sequence[int], seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """(N, 1, H, W) whole levels of rain: drops at random, each drawn out to a streak.

    The streaks of an image have one angle, length, width and brightness.
    """
    height, width = (side + _KERNEL - 1 for side in size)
    drawn = torch.stack([_uniform(5 + height * width, seed, device) for seed in seeds])
    kind, drops = drawn[:, :5, None, None], drawn[:, 5:].view(-1, height, width)
    density, length, across, bright = (
        low + (high - low) * kind[:, number]
        for number, (low, high) in enumerate((_DENSITY, _LENGTH, _WIDTH, _BRIGHT))
    )  # (N, 1, 1) each
    angle = math.radians(_ANGLE) * (2 * kind[:, 4] - 1)
    reach = torch.arange(_KERNEL, device=device) - _KERNEL // 2
    y, x = reach[:, None], reach[None, :]
    along = (y * angle.cos() + x * angle.sin()).abs()  # (N, K, K), pixels from the drop
    beside = x * angle.cos() - y * angle.sin()
    kernel = (-(beside / across).square() / 2).exp() * (length / 2 + 0.5 - along).clamp(0, 1)
    fallen = (drops < density).to(kernel.dtype)
    rain = F.conv2d(fallen[None], kernel[:, None], groups=len(drops))[0]  # (N, H, W)
    return (rain * bright).clamp_(0, 255).round_()[:, None]


def _normal(shape: Sequence[int], seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def _uniform(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(count, generator=generator, device=device)
