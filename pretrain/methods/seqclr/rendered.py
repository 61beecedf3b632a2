"""A world of rendered words: random letters in the fonts that matplotlib ships, for trying things.

Far from photographs and from handwriting: what helps here may not help there.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path

LETTERS = "abcdefghkmnt"
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
LIST = "words.txt"
_SIZE = 32  # of the fonts, pixels
_MARGIN = 4


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
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    face = ImageFont.truetype(str(fonts / f"{FACES[rng.integers(len(FACES))]}.ttf"), _SIZE)
    left, top, right, bottom = face.getbbox(text)
    width, height = int(right - left) + 2 * _MARGIN, int(bottom - top) + 2 * _MARGIN
    ink = Image.new("L", (width, height), 0)
    ImageDraw.Draw(ink).text((_MARGIN - left, _MARGIN - top), text, font=face, fill=255)
    paper, written = 220.0, 40.0
    slope = np.zeros((height, width))
    if style:
        middle, half = rng.uniform(90, 165), rng.uniform(25, 90) * rng.choice([-1, 1])
        paper, written = middle + half, middle - half
        along, down = rng.uniform(-40, 40, 2)
        slope = np.linspace(-along, along, width) + np.linspace(-down, down, height)[:, None]
    share = np.asarray(ink, np.float64) / 255
    pixels = paper + (written - paper) * share + slope + rng.normal(0, 6, share.shape)
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


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
