"""Photographs as they are restored: their pixels, and what of a file must not get lost."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.images import read_upright

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MADE_BY = "virtex-d2 restoration"  # the text entry of a PNG that says how it was made


@dataclass(frozen=True, eq=False)
class Photo:
    """An upright image of 8 bits.

    Attributes:
        pixels: (3, H, W) float32 RGB on the scale 0-255; grey ones have three equal channels.
        alpha: (H, W) uint8, where it has some.
        grey: whether it has no colours.
        profile: the ICC profile that its colours are of.
    """

    pixels: torch.Tensor
    alpha: np.ndarray | None = None
    grey: bool = False
    profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.pixels.shape[1:])

    @classmethod
    def of(cls, image: Image.Image, profile: bytes | None = None) -> "Photo":
        """Of Pillow's L, LA, RGB or RGBA."""
        levels = np.asarray(image)
        levels = levels[:, :, None] if levels.ndim == 2 else levels
        grey, has_alpha = image.mode in ("L", "LA"), image.mode in ("LA", "RGBA")
        colours = np.repeat(levels[:, :, :1], 3, axis=2) if grey else levels[:, :, :3]
        pixels = torch.from_numpy(colours.transpose(2, 0, 1).astype(np.float32))
        return cls(pixels, levels[:, :, -1].copy() if has_alpha else None, grey, profile)

    def restored(self, pixels: torch.Tensor) -> "Photo":
        """What is written in its place: whole levels, grey as it was, and alpha of the new size.

        Args:
            pixels: (3, kH, kW), of a network.
        """
        if self.grey:
            shares = pixels.new_tensor(_GREY)
            pixels = torch.tensordot(shares, pixels, 1).expand(3, -1, -1)
        pixels, alpha = pixels.clamp(0, 255).round_(), self.alpha
        if alpha is not None and alpha.shape != pixels.shape[1:]:
            size = pixels.shape[2], pixels.shape[1]
            alpha = np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BICUBIC))
        return replace(self, pixels=pixels, alpha=alpha)

    def cropped(self, height: int, width: int) -> "Photo":
        """Its upper left part."""
        alpha = None if self.alpha is None else self.alpha[:height, :width]
        return replace(self, pixels=self.pixels[:, :height, :width], alpha=alpha)

    def image(self) -> Image.Image:
        """For Pillow: L, LA, RGB or RGBA."""
        levels = self.pixels.to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(levels[:, :, 0] if self.grey else levels)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        return image


def read_photo(path: str) -> Photo:
    """Read an image of 8 bits: grey, RGB or of a palette, with or without alpha.

    What has more bits, or four inks, is refused: it would be written back with less than it has.
    """
    profile = None

    def decode(image: Image.Image) -> Image.Image:
        nonlocal profile
        if found := _too_much(image):
            raise OSError(
                f"it has {found}; expected one image of 8 bits a channel, grey, RGB or of a "
                "palette, with or without alpha. Convert it first: what it has more would be lost"
            )
        profile = image.info.get("icc_profile")
        grey = image.mode in ("1", "L", "LA")
        alpha = "A" in image.mode or "transparency" in image.info
        return image.convert(("L" if grey else "RGB") + ("A" if alpha else ""))

    try:
        image = read_upright(path, decode)
    except OSError as error:
        raise InputError(f"{path}: cannot be used: {error.strerror or error}.") from error
    return Photo.of(image, profile)


def _too_much(image: Image.Image) -> str:
    """What of an opened image 8 bits in `_MODES` could not hold; "" where there is nothing."""
    # The raw modes of what Pillow would make 8 bits of without a word, and the white of PPMs.
    raw = [tile[3] for tile in image.tile]
    words = [word for args in raw for word in (args if isinstance(args, tuple) else (args,))]
    deep = any(";16" in word for word in words if isinstance(word, str))
    deep |= image.format == "PPM" and any(word > 255 for word in words if isinstance(word, int))
    if deep or image.mode.startswith("I"):
        return "more than 8 bits a channel"
    if image.mode not in _MODES:
        return f"the mode {image.mode}"
    frames = getattr(image, "n_frames", 1)
    # MPO: photographs of phones, with a second one for depth
    return f"{frames} frames" if frames > 1 and image.format != "MPO" else ""


def write_photo(photo: Photo, path: str, made: Mapping[str, object]) -> None:
    """Write a PNG, atomically, that says how it was `made`."""
    entries = PngImagePlugin.PngInfo()
    entries.add_text(_MADE_BY, json.dumps(dict(made), sort_keys=True))
    try:
        with atomic_path(path) as temporary:
            photo.image().save(temporary, pnginfo=entries, icc_profile=photo.profile)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error


def made_of(path: str) -> dict[str, object] | None:
    """How a result was made, as `write_photo` was told; None where it does not say."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[_MADE_BY])
    except (OSError, KeyError, ValueError, TypeError):
        return None
