"""Colours of a batch, on the device: jitter and normalisation.

The host draws how each image's colours change (`draw_jitter`, from the sample's own generator) and
sends bytes. Jitter is torchvision's ColorJitter on floats; it works on each image for itself, so
that the result does not depend on what else is in the batch: sums, the only place where it could,
are taken over whole numbers.
"""

import functools

import numpy as np
import torch

from pretrain.device import upload
from virtex_d2.engine.backbone_file import IMAGENET_MEAN as PIXEL_MEAN
from virtex_d2.engine.backbone_file import IMAGENET_STD as PIXEL_STD

# Kinds of change in the order of `jitter`'s amounts; no change at all.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NOTHING = -1

# Share of each colour in the grey of an image: ITU-R BT.601, rounded as in torchvision.
_GREY = (0.2989, 0.587, 0.114)

# Images at a time. One image fits a CPU's caches; a GPU wants as much as there is.
_AT_A_TIME = {"cpu": 1}


def draw_jitter(
    amounts: tuple[float, float, float, float], probability: float, rng: np.random.Generator
) -> torch.Tensor:
    """How the colours of an image change: the four changes in random order, or nothing.

    Args:
        amounts: largest relative change of brightness, contrast and saturation, and largest shift
            of the hue (fraction of the circle).
        probability: that the colours change at all.
        rng: of the sample.

    Returns:
        (4, 2) float32: kind of each change (-1: none) and its factor or, of the hue, its shift.
    """
    steps = np.full((4, 2), (_NOTHING, 0), np.float32)
    if rng.random() < probability:
        for step, kind in zip(steps, rng.permutation(4)):
            amount = amounts[kind]
            if amount > 0:
                low, high = (-amount, amount) if kind == HUE else (max(0, 1 - amount), 1 + amount)
                step[:] = kind, rng.uniform(low, high)
    return torch.from_numpy(steps)


def normalize(
    images: torch.Tensor,
    jitter: torch.Tensor | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Bytes -> what the network sees: jittered, less ImageNet's mean, over its standard deviation.

    Args:
        images: (N, 3, H, W) uint8 RGB, in any memory format.
        jitter: (N, 4, 2) float32 of `draw_jitter`, on the CPU; None leaves the colours.
        memory_format: of the result.

    Returns:
        (N, 3, H, W) float32 on the device of the images.
    """
    result = torch.empty(
        images.shape, dtype=torch.float32, device=images.device, memory_format=memory_format
    )
    mean, std = _mean_and_std(images.device)
    size = _AT_A_TIME.get(images.device.type, max(len(images), 1))
    for first in range(0, len(images), size):
        chunk = slice(first, first + size)
        pixels = images[chunk].to(torch.float32, memory_format=torch.contiguous_format)
        if jitter is not None:
            jitter_colors(pixels, jitter[chunk])
        result[chunk] = pixels.sub_(mean).div_(std)
    return result


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each; copied to a device once, for which it is waited."""
    return tuple(torch.tensor(of).view(3, 1, 1).to(device) for of in (PIXEL_MEAN, PIXEL_STD))


def jitter_colors(pixels: torch.Tensor, jitter: torch.Tensor) -> None:
    """Change colours in place.

    Args:
        pixels: (N, 3, H, W) float32 RGB on the scale 0-255, contiguous.
        jitter: (N, 4, 2) float32 of `draw_jitter`, on the CPU, where it says what is to be done
            without waiting for the device.
    """
    # all that is to be done, in order: (step, kind) -> images and factors
    groups: dict[tuple[int, float], list[tuple[int, float]]] = {}
    for row, steps in enumerate(jitter.tolist()):
        for number, (kind, factor) in enumerate(steps):
            if kind != _NOTHING:
                groups.setdefault((number, kind), []).append((row, factor))
    if not groups:
        return
    ordered = sorted(groups)
    sizes = [len(groups[key]) for key in ordered]
    # to the device in one go each
    rows, factors = zip(*(member for key in ordered for member in groups[key]))
    rows_of = upload(torch.tensor(rows), pixels.device).split(sizes)
    factors_of = upload(torch.tensor(factors).view(-1, 1, 1, 1), pixels.device).split(sizes)
    for (_, kind), rows, factors in zip(ordered, rows_of, factors_of):
        whole = len(rows) == len(pixels)
        selected = pixels if whole else pixels[rows]
        _CHANGES[kind](selected, factors)
        if not whole:
            pixels[rows] = selected


def _brightness(pixels: torch.Tensor, factor: torch.Tensor) -> None:
    pixels.mul_(factor).clamp_(0, 255)


def _contrast(pixels: torch.Tensor, factor: torch.Tensor) -> None:
    """Towards the mean grey, or away from it."""
    # in sixteenths, which doubles add without rounding, in whatever order
    mean = _grey(pixels).mul_(16).round_().mean((1, 2, 3), True, dtype=torch.float64).div_(16)
    pixels.mul_(factor).add_(((1 - factor) * mean).to(torch.float32)).clamp_(0, 255)


def _saturation(pixels: torch.Tensor, factor: torch.Tensor) -> None:
    """Towards each pixel's grey, or away from it."""
    grey = _grey(pixels).mul_(1 - factor)
    pixels.mul_(factor).add_(grey).clamp_(0, 255)


def _hue(pixels: torch.Tensor, shift: torch.Tensor) -> None:
    """Turn the hue; value and saturation of HSV stay.

    In sixths of the circle, and with each colour's share between the smallest (0) and the largest
    (1) of the three, a hue lies 1 - red + green + blue away from red, on green's side or on blue's.
    Back from a hue h, red's share is |h - 3| - 1, green's 2 - |h - 2| and blue's 2 - |h - 4|, cut
    off at 0 and 1. These are torchvision's table of six cases without a case: masks are slow on
    CPUs.
    """
    red, green, blue = pixels.split(1, 1)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(lowest)
    hue = (green + blue).sub_(red).sub_(lowest).add_(spread).div_(spread.clamp(min=1e-6))
    hue.copysign_(green - blue).add_(shift * 6 + 6)
    hue.div_(6).frac_().mul_(6)
    torch.sub(hue, 3, out=red).abs_().sub_(1)
    torch.sub(hue, 2, out=green).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=blue).abs_().neg_().add_(2)
    pixels.clamp_(0, 1).mul_(spread).add_(lowest)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)"""
    red, green, blue = pixels.split(1, 1)
    return (red * _GREY[0]).add_(green * _GREY[1]).add_(blue * _GREY[2])


_CHANGES = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
