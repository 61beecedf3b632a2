"""Read images of every kind the same way everywhere: RGB and upright, or an error says why."""

from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

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


def read_image(file: str | BinaryIO, smallest_side: int = 0) -> Image.Image:
    """Decode an image as RGB, upright as its EXIF orientation says.

    Args:
        file: its path, or its bytes as a stream.
        smallest_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 scale as long as no side falls below.

    Raises:
        OSError: the file is missing, cut short, not an image, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(file) as image:
            if smallest_side:
                image.draft("RGB", (smallest_side, smallest_side))
            # Pillow refuses twice as many and warns of these; they would take 270 MB and more
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are too many to decode")
            decoded = _as_rgb(image)
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
    # Pillow would clip 16-bit grey at 255: scale it. Before version 11.3, PNGs of it have mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # or Pillow warns
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None where there is none, or none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF is no reason to lose a whole image; see read_image
        return None
