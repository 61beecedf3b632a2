"""Small images of words, for tests to which it does not matter what is read."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw_word(text: str, seed: int = 0) -> Image.Image:
    """Dark on light, as large as the text."""
    rng = np.random.default_rng(seed)
    font = ImageFont.truetype(str(FONT), 24)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (right - left + 8, bottom - top + 8), tuple(rng.integers(180, 256, 3)))
    ink = tuple(rng.integers(0, 80, 3))
    ImageDraw.Draw(image).text((4 - left, 4 - top), text, ink, font)
    return image


def write_words(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder with `count` PNGs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        text = "".join(rng.choice(list("abcdefgh"), rng.integers(3, 7)))
        draw_word(text, seed + number).save(folder / f"{number}.png")
    return folder
