"""What happens to an image and its caption on the host: crop and flip, in bytes.

Jitter is drawn here too; the device carries it out, with normalisation: `pretrain.colors`.

VirTex's recipe (arXiv 2006.06666, section 3.3). Every random number comes from the generator that
is passed in, so that a sample can be made again.
"""

import math
import re

import numpy as np
import torch
from PIL import Image

from pretrain.colors import draw_jitter
from pretrain.crops import Picture
from pretrain.jpeg import Box

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
    """Random resized crop, flip with the caption; what jitter is to do.

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
        self, picture: Picture, caption: str, rng: np.random.Generator
    ) -> tuple[torch.Tensor, str, torch.Tensor]:
        """A random view of a picture.

        Everything is drawn before a pixel is decoded: which are needed depends on it.

        Returns:
            (3, size, size) uint8 RGB, a colour's bytes three apart (channels last); the caption;
            and (4, 2) float32 of `pretrain.colors.draw_jitter`.

        Raises:
            OSError: the picture cannot be decoded.
        """
        box = self._crop_box(picture.size, rng)
        flip = bool(rng.random() < self.flip)
        jitter = draw_jitter(self.jitter, self.jitter_prob, rng)
        pixels = picture.crop(box, self.size, flip)
        return _to_tensor(pixels), swap_sides(caption) if flip else caption, jitter

    def _crop_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
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
        return _to_tensor(np.array(image)), caption


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W), without moving a byte."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
