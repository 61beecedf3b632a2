"""Images of which crops are taken: plain JPEGs by decoding no more than a crop needs, others whole.

Nearly all of a training sample's time is entropy decoding, so that what a crop leaves out should
not be decoded. Three things of the format allow that. Its 8 x 8 blocks are frequencies: an image of
half, a quarter or an eighth of the size takes only the lowest of them. Rows below the crop come
last. And where a file has restart markers, each stretch between two of them can be read by itself:
from these stretches a smaller JPEG is put together, which holds the crop and little else (ITU-T
T.81, B.2 and F.1.1.5). Files of `tools/prepare_images.py` have a marker after every block of 8 x 8
or 16 x 16 pixels.

Pixels are those of decoding the whole file, bit for bit. What is not a plain, whole JPEG (EXIF
orientation, CMYK, damage, ...) is left to `virtex_d2.engine.images`, which says what it is.
"""

import functools
import io
import threading
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from virtex_d2.engine.images import read_image

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside

_SOF, _PROGRESSIVE, _DRI, _SOS, _EOI, _RST = (0xC0, 0xC1), 0xC2, 0xDD, 0xDA, 0xD9, 0xD0
_APP0, _APP15, _APP1, _APP2 = 0xE0, 0xEF, 0xE1, 0xE2
_TABLES = (0xDB, 0xC4, 0xFE)  # quantisation, Huffman, comments
# Of a picture's size; libjpeg has more of them, but is slower there than at the full size.
_REDUCTIONS = (8, 4, 2)
# Pixels that a reduced part keeps at least. Colours of half the width are smoothed by libjpeg only
# where they have more than two columns, which a part must have where the whole has them.
_FEWEST = 8
# Decoded bytes up to which memory is kept for the next image. What is asked for anew is mapped page
# by page, each time.
_KEPT = 3 * 4_000_000


class Picture(Protocol):
    """An image that has a size, and crops that are decoded when they are asked for."""

    size: tuple[int, int]  # width, height in pixels

    def crop(self, box: Box, side: int, flip: bool = False) -> np.ndarray:
        """The box as a (side, side, 3) uint8 RGB array, mirrored if asked for.

        Raises:
            OSError: the image cannot be decoded.
        """

    def whole(self) -> Image.Image:
        """All of it, RGB.

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

    def whole(self) -> Image.Image:
        return self._image


class NotPlainError(Exception):
    """Not a JPEG that this module decodes as Pillow would."""


def open_picture(file: str | BinaryIO, smallest_side: int) -> Picture:
    """An image file of any kind that Pillow reads.

    Args:
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
        return Jpeg(data)
    except NotPlainError:
        return DecodedPicture(read_image(io.BytesIO(data), smallest_side))


def _square(pixels: np.ndarray, side: int, flip: bool) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): bilinear, antialiased where it shrinks."""
    # the batch first: torch then sees that colours are last, and lays the result out likewise
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    square = interpolate(planes, (side, side), mode="bilinear", antialias=True)
    square = np.ascontiguousarray(square[0].permute(1, 2, 0).numpy())
    return cv2.flip(square, 1) if flip else square


class _Scratch(threading.local):
    """Of each thread: memory that images are decoded into, one after the other."""

    def __init__(self):
        self._kept = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        """At least `size` bytes."""
        if size > _KEPT:
            return np.empty(size, np.uint8)
        if size > len(self._kept):
            self._kept = np.empty(size, np.uint8)
        return self._kept


_scratch = _Scratch()


@dataclass(frozen=True)
class _Header:
    """Of a JPEG with 8 bits, in grey or three colours, stored upright."""

    # width, height: pixels
    width: int
    height: int
    frame: int  # where its start-of-frame segment's content begins; height and width follow a byte
    # width and height of what is encoded together (minimum coded unit), pixels
    mcu: tuple[int, int]
    interval: int  # MCUs from one restart marker to the next; 0 without markers
    scan: int  # where entropy-coded data begins, if there is one scan of all colours; else 0


@dataclass(frozen=True)
class _Part:
    """A JPEG of a part of the image: where that begins, and its size."""

    data: bytes
    left: int
    top: int
    width: int
    height: int
    strict: bool = True  # whether to refuse what libjpeg only warns of


class Jpeg:
    """A picture in a plain JPEG; others raise `NotPlainError`."""

    def __init__(self, data: bytes):
        self._data = data
        self._header = _read_header(data)
        self.size = self._header.width, self._header.height

    def crop(self, box: Box, side: int, flip: bool = False) -> np.ndarray:
        try:
            return _square(self.pixels(box, side), side, flip)
        except NotPlainError:  # cut short, or damaged: Pillow says which, and decodes the latter
            return DecodedPicture(self.whole()).crop(box, side, flip)

    def whole(self) -> Image.Image:
        return read_image(io.BytesIO(self._data))

    def pixels(self, box: Box, side: int) -> np.ndarray:
        """Decode a part of the image, at full or reduced size.

        Args:
            side: pixels that width and height of the part must keep, if they have as many.

        Returns:
            (height, width, 3) uint8 RGB, of the box's size divided by 1, 2, 4 or 8 and rounded up
            or down. The next image that this thread decodes will overwrite it.

        Raises:
            NotPlainError: the file is cut short or damaged.
        """
        smaller = min(box[2] - box[0], box[3] - box[1])
        reduction = next((r for r in _REDUCTIONS if smaller >= r * max(side, _FEWEST)), 1)
        # in reduced pixels; halves are rounded up: no side loses one by where it begins
        x0, y0, x1, y1 = ((place + reduction // 2) // reduction for place in box)
        part = self._part((x0, y0, x1, y1), reduction)
        height, width = -(-part.height // reduction), -(-part.width // reduction)
        try:
            pixels = simplejpeg.decode_jpeg(
                part.data,
                "RGB",
                min_height=height,
                min_width=width,
                min_factor=reduction,
                buffer=_scratch.of(3 * height * width),
                strict=part.strict,
            )
        except ValueError as error:  # where that is strict, also what libjpeg only warns of
            raise NotPlainError(str(error)) from error
        left, top = part.left // reduction, part.top // reduction  # they are multiples of 8
        return pixels[y0 - top : y1 - top, x0 - left : x1 - left]

    def _part(self, box: Box, reduction: int = 1) -> _Part:
        """The box, in reduced pixels, and as little more as can be told apart without decoding."""
        header = self._header
        # a pixel more is needed on each side: colours are smoothed over the edges of MCUs
        x0, y0, x1, y1 = (
            (place + more) * reduction for place, more in zip(box, (-1, -1, 1, 1), strict=True)
        )
        outer = max(x0, 0), max(y0, 0), min(x1, header.width), min(y1, header.height)
        if self._intervals is not None:
            return self._between_markers(outer)
        bottom = -(-outer[3] // header.mcu[1]) * header.mcu[1]
        # libjpeg warns of the data that is left over, and so hides its other warnings. A file that
        # has its end, and not before, is not cut short; of other damage Pillow takes what comes out
        # as well.
        if header.scan and bottom < header.height and self._has_its_end():
            at = header.frame + 1
            data = self._data[:at] + bottom.to_bytes(2, "big") + self._data[at + 2 :]
            return _Part(data, 0, 0, header.width, bottom, strict=False)
        return _Part(self._data, 0, 0, *self.size)

    def _has_its_end(self) -> bool:
        """Whether only restart markers stand before the end marker, which ends the file."""
        places, kinds = self._markers
        return (
            len(kinds) > 0
            and kinds[-1] == _EOI
            and places[-1] == len(self._data) - 2
            and bool((kinds[:-1] & 0xF8 == _RST).all())
        )

    def _between_markers(self, box: Box) -> _Part:
        """A JPEG of the stretches between restart markers that hold the box."""
        header, (starts, ends) = self._header, self._intervals
        step, mcu_height = header.mcu[0] * header.interval, header.mcu[1]
        first_row, first_column = box[1] // mcu_height, box[0] // step
        last_row, last_column = (box[3] - 1) // mcu_height, (box[2] - 1) // step
        left, top = first_column * step, first_row * mcu_height
        width = min((last_column + 1) * step, header.width) - left
        height = min((last_row + 1) * mcu_height, header.height) - top

        rows = np.arange(first_row, last_row + 1) * -(-header.width // step)
        begins, finishes = starts[rows + first_column], ends[rows + last_column] + 2
        data = np.frombuffer(self._data, np.uint8)
        part = np.concatenate(
            [data[: header.scan], *(data[a:b] for a, b in zip(begins.tolist(), finishes.tolist()))]
        )
        size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        part[header.frame + 1 : header.frame + 5] = np.frombuffer(size, np.uint8)
        # markers are counted from 0 to 7 and from 0 again; the last one becomes the image's end
        lengths = finishes - begins
        moved = header.scan + np.cumsum(lengths) - lengths - begins
        markers = ends[rows[:, None] + np.arange(first_column, last_column + 1)] + moved[:, None]
        markers = markers.ravel() + 1
        part[markers] = _RST + (np.arange(len(markers)) & 7)
        part[markers[-1]] = _EOI
        return _Part(part.tobytes(), left, top, width, height)

    @functools.cached_property
    def _markers(self) -> tuple[np.ndarray, np.ndarray]:
        """Places, (markers,) int64, and kinds, uint8, of the markers behind the scan's header."""
        data = np.frombuffer(self._data, np.uint8)
        places = np.flatnonzero(data[self._header.scan : -1] == 0xFF) + self._header.scan
        kinds = data[places + 1]
        return places[kinds != 0], kinds[kinds != 0]  # 0xFF 0x00 is a coded 0xFF

    @functools.cached_property
    def _intervals(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Where each stretch between restart markers begins and ends; None if they are of no use.

        Each is (intervals,) int64. A row of MCUs must be whole intervals, or they would not tile a
        rectangle.
        """
        header = self._header
        columns, rows = (-(-side // unit) for side, unit in zip(self.size, header.mcu))
        if not header.scan or not header.interval or columns % header.interval:
            return None
        places, kinds = self._markers
        count = columns * rows // header.interval
        wanted = _RST + (np.arange(count) & 7)
        wanted[-1] = _EOI
        if len(kinds) < count or (kinds[:count] != wanted).any():
            return None
        ends = places[:count]
        return np.concatenate([[header.scan], ends[:-1] + 2]), ends


def _read_header(data: bytes) -> _Header:
    if data[:2] != b"\xff\xd8":
        raise NotPlainError("no JPEG")
    place, frame, interval, progressive = 2, 0, 0, False
    try:
        while True:
            if data[place] != 0xFF:
                raise NotPlainError("no marker where one should be")
            kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
            content = place + 4
            if kind == _SOS:
                break
            if kind in _SOF or kind == _PROGRESSIVE:
                if frame:
                    raise NotPlainError("two frames")
                frame, progressive = content, kind == _PROGRESSIVE
            elif kind == _DRI:
                interval = int.from_bytes(data[content : content + 2], "big")
            elif _APP0 <= kind <= _APP15:
                _refuse_turned(kind, data[content : place + 2 + length])
            elif kind not in _TABLES:
                raise NotPlainError(f"a segment of kind {kind:x}")
            place += 2 + length
        components = data[frame + 5] if frame else 0
        height, width = (int.from_bytes(data[frame + i : frame + i + 2], "big") for i in (1, 3))
        if not frame or data[frame] != 8 or components not in (1, 3) or not width or not height:
            raise NotPlainError("no frame of 8 bits in grey or three colours")
        sampling = [data[frame + 7 + 3 * i] for i in range(components)]
        in_scan = data[content]
    except IndexError as error:
        raise NotPlainError("cut short in its header") from error
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise NotPlainError("too many pixels")
    # one colour is not interleaved: its MCU is a block, whatever its sampling says (T.81, A.2.2)
    mcu = (8 * max(s >> 4 for s in sampling), 8 * max(s & 15 for s in sampling))
    one_scan = in_scan == components and not progressive
    return _Header(
        width,
        height,
        frame,
        mcu if components == 3 else (8, 8),
        interval,
        place + 2 + length if one_scan else 0,
    )


def _refuse_turned(kind: int, content: bytes) -> None:
    """Leave to Pillow what it may turn upright, and files of several pictures."""
    if kind == _APP1 and content[:6] == b"Exif\0\0":
        exif = Image.Exif()
        try:
            exif.load(content)
            upright = exif.get(ExifTags.Base.Orientation, 1) == 1
        except Exception as error:  # Pillow's parsers answer damaged bytes with nearly any kind
            raise NotPlainError("damaged EXIF") from error
        if not upright:
            raise NotPlainError("turned")
    elif kind == _APP1 and b"Orientation" in content:  # in XMP
        raise NotPlainError("perhaps turned")
    elif kind == _APP2 and content[:4] == b"MPF\0":
        raise NotPlainError("several pictures")
