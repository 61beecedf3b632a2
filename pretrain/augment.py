"""What happens to an image and its caption: crop, flip and jitter on the host, normalisation on the
device.

VirTex's recipe (arXiv 2006.06666, section 3.3). Every random number comes from the generator that
is passed in, so that a sample can be made again.
"""

import math
import re

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

# ImageNet's, RGB, on the scale 0-255: what torchvision's ResNets expect.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

_SIDES = {"left": "right", "right": "left"}
_SIDE_WORD = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def swap_sides(caption: str) -> str:
    """Exchange the words left and right; "bright" and "leftover" stay as they are."""

    def other(match: re.Match) -> str:
        word = match[0]
        swapped = _SIDES[word.lower()]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE_WORD.sub(other, caption)


class TrainTransform:
    """Random resized crop, flip with the caption, colour jitter.

    Args:
        size: side of the crop in pixels.
        scale, ratio: ranges of the kept area (fraction) and of its aspect ratio.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness, contrast and saturation, and largest shift of
            the hue (fraction of the circle).
        jitter_prob: probability that the colours are changed at all.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
    ):
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self.jitter = jitter
        self.jitter_prob = jitter_prob

    @property
    def smallest_side(self) -> int:
        """Pixels that an image's shorter side must keep for its smallest crop to stay sharp."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(self.size / math.sqrt(self.scale[0] * narrowest))

    def __call__(
        self, image: Image.Image, caption: str, rng: np.random.Generator
    ) -> tuple[torch.Tensor, str]:
        """RGB image and caption -> ((3, size, size) uint8, caption)."""
        image = image.resize(
            (self.size, self.size), Image.Resampling.BILINEAR, box=self._crop_box(image.size, rng)
        )
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
            caption = swap_sides(caption)
        if rng.random() < self.jitter_prob:
            image = self._jittered(image, rng)
        return _to_tensor(image), caption

    def _crop_box(
        self, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """As torchvision's RandomResizedCrop: ten tries, then the largest central crop."""
        width, height = size
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return x, y, x + w, y + h
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        x, y = (width - w) // 2, (height - h) // 2
        return x, y, x + w, y + h

    def _jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """As torchvision's ColorJitter: the four changes in random order."""
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind in rng.permutation(4):
            strength = self.jitter[kind]
            if strength <= 0:
                continue
            if kind < 3:
                factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                image = enhancers[kind](image).enhance(factor)
            else:
                image = _shift_hue(image, rng.uniform(-strength, strength))
        return image


class EvalTransform:
    """The central square at `size`: (image, caption) -> ((3, size, size) uint8, caption)."""

    def __init__(self, size: int):
        self.size = size

    @property
    def smallest_side(self) -> int:
        """Pixels that an image's shorter side must keep."""
        return self.size

    def __call__(
        self, image: Image.Image, caption: str, rng: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, str]:
        width, height = image.size
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        image = image.resize(
            (self.size, self.size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side)
        )
        return _to_tensor(image), caption


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) RGB -> float32 of the same shape, less ImageNet's mean, over its std."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(3, 1, 1)
    return (images.to(torch.float32) - mean) / std


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 255)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
