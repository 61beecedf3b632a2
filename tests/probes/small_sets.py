"""Images that are easy to tell apart, and VOC folders of them."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 40, 210)}


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 34)):
    """A noisy image around a colour."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def write_voc(root: Path, images: dict[str, list[tuple[str, bool]]], splits: dict[str, list[str]]):
    """A VOC folder; `images`: name -> objects as (class, difficult)."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, (name, objects) in enumerate(images.items()):
        colours = [np.array(COLOURS.get(c, (120, 120, 120))) for c, _ in objects]
        colour = np.mean(colours, axis=0) if colours else (120, 120, 120)
        picture(colour, seed).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        told = "".join(
            f"<object><name>{c}</name><difficult>{int(difficult)}</difficult></object>"
            for c, difficult in objects
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{told}</annotation>")
    for split, names in splits.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
