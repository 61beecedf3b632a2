"""Images of which crops are taken: plain JPEGs by little decoding, others whole."""

import io
from typing import BinaryIO, Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from pretrain.jpeg import Box, Jpeg, NotPlainError
from virtex_d2.engine.images import read_image


class Picture(Protocol):
    """An image that has a size, and crops that are decoded when they are asked for."""

    size: tuple[int, int]  # width, height in pixels

    def crop(self, box: Box, side: int, flip: bool = False) -> np.ndarray:
        """The box as a (side, side, 3) uint8 RGB array, mirrored if asked for.

        Raises:
            OSError: the image cannot be decoded.
        """


class DecodedPicture:
    """A picture that is in memory: an RGB image."""

    def __init__(self, image: Image.Image):
        self._image = image
        self.size = image.size

    def crop(self, box: Box, side: int, flip: bool = False) -> np.ndarray:
        return _square(np.array(self._image.crop(box)), side, flip)


class JpegPicture:
    """A picture in a plain JPEG.

    Args:
        data: the file.

    Raises:
        NotPlainError: it is no plain JPEG.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._jpeg = Jpeg(data)
        self.size = self._jpeg.size

    def crop(self, box: Box, side: int, flip: bool = False) -> np.ndarray:
        try:
            return _square(self._jpeg.crop(box, side), side, flip)
        except NotPlainError:  # cut short, or damaged: Pillow says which, and decodes the latter
            return DecodedPicture(read_image(io.BytesIO(self._data))).crop(box, side, flip)


def open_picture(file: str | BinaryIO, smallest_side: int) -> Picture:
    """An image file of any kind that Pillow reads.

    Args:
        file: its path, or its bytes as a stream.
        smallest_side: pixels that no side may fall below, where the image is reduced.

    Raises:
        OSError: it cannot be read or, unless it is a plain JPEG, not be decoded.
    """
    if isinstance(file, str):
        with open(file, "rb") as stream:
            data = stream.read()
    else:
        data = file.read()
    try:
        return JpegPicture(data)
    except NotPlainError:
        return DecodedPicture(read_image(io.BytesIO(data), smallest_side))


def _square(pixels: np.ndarray, side: int, flip: bool) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): bilinear, antialiased where it shrinks."""
    # the batch first: torch then sees that colours are last, and lays the result out likewise
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    square = interpolate(planes, (side, side), mode="bilinear", antialias=True)
    square = np.ascontiguousarray(square[0].permute(1, 2, 0).numpy())
    return cv2.flip(square, 1) if flip else square
