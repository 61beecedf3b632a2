"""A world of rendered words, and of pages: random letters in the fonts that matplotlib ships.

Far from photographs and from handwriting: what helps here may not help there.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path, write_json

LETTERS = "abcdefghkmnt"
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
LIST = "words.txt"
_SIZE = 32  # of the fonts, pixels
_MARGIN = 4
# Of pages, pixels: fonts, and clutter's sides.
_PAGE_SIZES, _CLUTTER_SIZES = (12, 22), (4, 40)
_TURN = 20  # degrees, at most
_TRIES = 20  # to find room for a word, or for clutter


def draw_word(text: str, rng: np.random.Generator, style: bool = False) -> Image.Image:
    """Draw a word, close to its edges, in one of `FACES`.

    Args:
        text: letters that the fonts have.
        rng: decides all that is random.
        style: grey levels, contrast and a gradient at random, light on dark as often as dark on
            light; else 40 on 220. Noise of deviation 6 is added in both.

    Returns:
        An image in grey; its size is the word's.
    """
    ink = _ink(text, rng, _SIZE, _MARGIN)
    width, height = ink.size
    paper, written = 220.0, 40.0
    slope = np.zeros((height, width))
    if style:
        middle, half = rng.uniform(90, 165), rng.uniform(25, 90) * rng.choice([-1, 1])
        paper, written = middle + half, middle - half
        slope = _slope(height, width, rng)
    share = np.asarray(ink, np.float64) / 255
    pixels = paper + (written - paper) * share + slope + rng.normal(0, 6, share.shape)
    return _gray(pixels)


def _ink(text: str, rng: np.random.Generator, size: int, margin: int) -> Image.Image:
    """A word's share of each pixel, 0 to 255, in a face drawn by `rng`."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    face = ImageFont.truetype(str(fonts / f"{FACES[rng.integers(len(FACES))]}.ttf"), size)
    left, top, right, bottom = face.getbbox(text)
    shape = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
    ink = Image.new("L", shape, 0)
    ImageDraw.Draw(ink).text((margin - left, margin - top), text, font=face, fill=255)
    return ink


def _slope(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) what a gradient adds to gray levels."""
    along, down = rng.uniform(-40, 40, 2)
    return np.linspace(-along, along, width) + np.linspace(-down, down, height)[:, None]


def _gray(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def draw_page(
    rng: np.random.Generator, size: int = 192, words: int = 6, clutter: int = 6
) -> tuple[Image.Image, list[np.ndarray]]:
    """Draw a page with words at random places, turned by up to 20 degrees, and with clutter.

    Args:
        rng: decides all that is random.
        size: of the page's sides, pixels.
        words: at most; 1 or more are drawn alike, and those put down that have room apart.
        clutter: discs and bars, as high in contrast as words, that are none.

    Returns:
        An image in gray, and of each word the corners of its upright box, turned: (4, 2) float64,
        x and y in pixels, along its outline.
    """
    pixels = rng.uniform(90, 165) + _slope(size, size, rng)
    taken = np.zeros((size, size), bool)
    outlines = []
    for wanted in [True] * rng.integers(1, words + 1) + [False] * clutter:
        if wanted:
            text = "".join(rng.choice(list(LETTERS), rng.integers(3, 7)))
            ink = _ink(text, rng, int(rng.integers(*_PAGE_SIZES)), 1)
        else:
            ink = _shape(rng)
        angle, (width, height) = rng.uniform(-_TURN, _TURN), ink.size
        share = ink.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        place = _room(taken, share.size, rng)
        if place is None:
            continue
        x, y = place
        level = rng.uniform(50, 115) * rng.choice([-1, 1])
        part = np.s_[y : y + share.height, x : x + share.width]
        pixels[part] += level * np.asarray(share, np.float64) / 255
        taken[part] = True
        if wanted:
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
            sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
            turned = corners @ np.array([(cosine, -sine), (sine, cosine)])  # y goes down
            outlines.append(turned + (x + share.width / 2, y + share.height / 2))
    return _gray(pixels + rng.normal(0, 4, pixels.shape)), outlines


def _shape(rng: np.random.Generator) -> Image.Image:
    """A disc or a bar, as `_ink`."""
    width, height = rng.integers(*_CLUTTER_SIZES, 2).tolist()
    shape = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(shape)
    (draw.ellipse if rng.integers(2) else draw.rectangle)((1, 1, width - 2, height - 2), fill=255)
    return shape


def _room(
    taken: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Where an image of (width, height) covers nothing; None where no such place was met."""
    height, width = (side - own for side, own in zip(taken.shape, reversed(size)))
    if height < 0 or width < 0:
        return None
    for _ in range(_TRIES):
        x, y = int(rng.integers(width + 1)), int(rng.integers(height + 1))
        if not taken[y : y + size[1], x : x + size[0]].any():
            return x, y
    return None


def write_pages(folder: str | os.PathLike, split: str, count: int, seed: int, **page: int) -> Path:
    """Write pages of words into `folder`/`split`, and their polygons in COCO's format.

    configs/text/ expects such a folder, named text, with the splits train and test.

    Args:
        folder: of all splits.
        split: its name.
        count: of pages.
        seed: those of one seed are nested.
        page: further arguments of `draw_page`.

    Returns:
        The annotations' path, `folder`/annotations/`split`.json.
    """
    folder = Path(folder)
    listed = folder / "annotations" / f"{split}.json"
    if count < 1:
        raise InputError(f"{listed}: {count} pages cannot be drawn; expected 1 or more.")
    if listed.exists():
        raise InputError(f"{listed}: exists already. Choose another folder, or another split.")
    for place in (folder / split, listed.parent):
        place.mkdir(parents=True, exist_ok=True)
    images, words = [], []
    for number in range(1, count + 1):
        drawn, outlines = draw_page(np.random.default_rng([seed, number]), **page)
        name = f"{number:06d}.png"
        drawn.save(folder / split / name)
        width, height = drawn.size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        words += [_annotation(len(words) + n, number, c) for n, c in enumerate(outlines, 1)]
    content = {"images": images, "annotations": words, "categories": [{"id": 1, "name": "word"}]}
    write_json(listed, content)  # last: a folder with annotations is whole
    return listed


def _annotation(number: int, image: int, outline: np.ndarray) -> dict:
    low, high = outline.min(0), outline.max(0)
    x, y = outline.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": [outline.ravel().round(2).tolist()],
        "bbox": [*low.round(2).tolist(), *(high - low).round(2).tolist()],
        "area": round(float(area), 2),
    }


def random_words(
    count: int, seed: int, letters: str = LETTERS, lengths: tuple[int, int] = (3, 6)
) -> Iterator[tuple[str, np.random.Generator]]:
    """Words of letters and lengths drawn alike, each with random numbers of its own.

    Worlds of one seed are nested: word n does not depend on `count`.
    """
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        length = rng.integers(lengths[0], lengths[1] + 1)
        yield "".join(rng.choice(list(letters), length)), rng


def write_words(
    folder: str | os.PathLike,
    count: int,
    seed: int,
    style: bool = False,
    letters: str = LETTERS,
    lengths: tuple[int, int] = (3, 6),
) -> Path:
    """Write a folder of images and `LIST`, path TAB word, of a set that DATA.WORDS takes.

    Returns:
        The list's path.
    """
    folder = Path(folder)
    if count < 1 or not letters or not 1 <= lengths[0] <= lengths[1]:
        raise InputError(
            f"{folder}: {count} words of {lengths[0]} to {lengths[1]} of the letters {letters!r} "
            "cannot be drawn."
        )
    if (folder / LIST).exists():
        raise InputError(f"{folder / LIST}: exists already. Choose another folder.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (word, rng) in enumerate(random_words(count, seed, letters, lengths)):
        name = f"images/{number:06d}.png"
        draw_word(word, rng, style).save(folder / name)
        lines.append(f"{name}\t{word}\n")
    with atomic_path(folder / LIST) as temporary:  # last: a folder with a list is whole
        temporary.write_text("".join(lines), encoding="utf-8")
    return folder / LIST
