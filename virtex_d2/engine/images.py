"""Find and read images the same way everywhere: RGB and upright, or an error says why.

detectron2's own reader goes through this, too (`virtex_d2.engine.compat`), so that training,
evaluation, checks, pictures and probes see the same pixels.
"""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

# What files of images end in.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jfif", "jpe", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"),
    *("jp2", "ppm", "pgm"),
)

# EXIF orientation -> what brings the image upright (Exif 2.3, tag 0x0112; 1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS = 258  # TIFF 6.0: BitsPerSample

# Pillow refuses twice as many pixels as it warns of. Here and not around each reading, after which
# Python would show all other warnings anew.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_image(file: str | BinaryIO, smallest_side: int = 0) -> Image.Image:
    """Decode an image as RGB, upright as its EXIF orientation says.

    Args:
        file: its path, or its bytes as a stream.
        smallest_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 scale as long as no side falls below.

    Grey of more than 8 bits is scaled to them: 16-bit levels by their type; those of 32 bits, whose
    files do not say where white is, by the smallest of 8, 16 and 31 bits that holds the brightest;
    fractions, likewise, by 1, 255 or 65535.

    Raises:
        OSError: the file is missing, cut short, not an image, of more than twice
            `PIL.Image.MAX_IMAGE_PIXELS`, or of levels that are no brightness.
    """
    return read_upright(file, _as_rgb, smallest_side)


def read_upright(
    file: str | BinaryIO,
    decode: Callable[[Image.Image], Image.Image],
    smallest_side: int = 0,
) -> Image.Image:
    """Decode an image by `decode`, which is given what Pillow has opened; else as `read_image`."""
    try:
        with Image.open(file) as image:
            if smallest_side:
                image.draft("RGB", (smallest_side, smallest_side))
            decoded = decode(image)
            # after decoding, because Pillow itself turns TIFFs upright while it decodes them
            turn = _UPRIGHT.get(_orientation(image))
    except UnidentifiedImageError as error:  # Pillow's words hold a memory address
        raise OSError("it is no image, or cut short in its header") from error
    except OSError:
        raise
    except Exception as error:
        # Pillow's parsers answer damaged bytes with nearly every kind of exception
        raise OSError(f"{type(error).__name__}: {error}") from error
    return decoded if turn is None else decoded.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey(image))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # or Pillow warns
    return image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """Levels that Pillow would clip at 255, as 8 bits."""
    levels = np.asarray(image)
    least, most = (levels.min(), levels.max()) if levels.size else (0, 0)
    if not (least >= 0 and most < 2**31):  # NaN is neither
        raise OSError(f"its grey levels are from {least} to {most}; expected numbers from 0 on")
    if image.mode == "F":
        white = next((white for white in (1, 255, 65535) if most <= white), None)
        if white is None:
            raise OSError(f"its grey levels reach {most:g}; expected up to 1, 255 or 65535")
        return np.round(levels * (255 / white)).astype(np.uint8)
    # Before version 11.3 Pillow has PNGs of 16 bits as mode I, and PPMs always.
    if image.mode != "I" or image.format in ("PNG", "PPM"):
        bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))[0]  # 12 in some TIFFs
    else:
        bits = next(bits for bits in (8, 16, 31) if most < 2**bits)
    return (levels.astype(np.uint32) >> (bits - 8)).astype(np.uint8)


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None where there is none, or none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF is no reason to lose a whole image; see read_image
        return None


def image_suffix(name: str) -> str:
    """Which of `IMAGE_SUFFIXES` a file's name ends in, perhaps before the "?" of an address; ""
    where none."""
    for whole in (name, name.split("?")[0]):
        suffix = whole.rpartition(".")[2].lower()
        if suffix in IMAGE_SUFFIXES:
            return suffix
    return ""


def files_in(folder: str) -> list[str]:
    """Paths of all files within a folder and its subfolders, sorted, relative to it.

    Links are followed, but none to a folder that it lies in. Names that begin with a dot are left
    out, and what is in such folders.
    """

    def below(path: str, prefix: str, above: frozenset) -> Iterator[str]:
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = [entry for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"{path}: the folder cannot be read: {error.strerror}.") from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            # entry.is_dir() would raise where a link is its own target
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from below(entry.path, f"{prefix}{entry.name}/", above | {here})
            else:
                yield prefix + entry.name

    return sorted(below(folder, "", frozenset()))


def missing_files(files: Iterable[str]) -> list[int]:
    """Find the files, by index, that are not there; "" is none.

    One listing a folder, not one question a file: network file systems are slow to ask.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for index, file in enumerate(files):
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = names_in(folder)
        if file and name not in present[folder]:
            missing.append(index)
    return missing


def names_in(folder: str) -> set[str]:
    """List the names in a folder; none where there is no such folder."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in it
        return set()
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error.strerror}.") from error


def images_in(folder: str, beside: Collection[str] = ()) -> list[str]:
    """Those of `files_in` that are images by their suffix; others, but those with suffixes that
    belong `beside` them (such as "txt"), are counted and named in the log.
    """
    names = files_in(folder)
    images = [name for name in names if image_suffix(name)]
    others = [name for name in names if not image_suffix(name)]
    others = [name for name in others if name.rpartition(".")[2].lower() not in beside]
    are = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    left_out = f"{are} left out for the suffix: {', '.join(others[:10])}"
    if not images:
        raise InputError(
            f"{folder}: it has no image: expected files that end in {', '.join(IMAGE_SUFFIXES)}, "
            f"found none in it{f'; {left_out}' if others else ''}."
        )
    if others:
        logger.warning("%s: %s", folder, left_out)
    return images
