"""A synthetic captioned world: an endless, seeded source of images, masks and captions.

For the demo and the tests, where no photographs are. Every random number comes from numpy's
`RandomState`, whose stream is frozen, and pixels are made by integer arithmetic (see
`shapes_draw`), so that a seed gives the same scenes on every machine.
"""

import hashlib
import operator
from dataclasses import dataclass

import numpy as np

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes import draw as shapes_draw
from virtex_d2.studies.shapes.captions import Caption, write_captions
from virtex_d2.studies.shapes.draw import CLASSES
from virtex_d2.studies.shapes.options import LARGEST, MOST_OBJECTS, SMALLEST

SIZES = ("small", "medium", "large")
# Radius of an object by its size, in percent of the image's side.
_RADII = {"small": (9, 12), "medium": (14, 18), "large": (21, 26)}
# An object whose visible share (percent) would fall below this is not painted over.
_LEAST_VISIBLE = 60
_TRIES = 12
# "In front of" is said where at least this share (percent) of the other is hidden.
_LEAST_HIDDEN = 5


@dataclass(frozen=True)
class SceneObject:
    """One object as it is seen.

    Attributes:
        name, color, size, pattern: words from CLASSES, `shapes_draw.COLORS`, SIZES and
            `shapes_draw.PATTERNS`.
        center: (x, y) in pixels.
        mask: (H, W) bool, the visible pixels.
        box: (x, y, width, height) around them, in pixels.
        covers: indices of objects that it hides enough of to be seen, and to be said.
    """

    name: str
    color: str
    size: str
    pattern: str
    center: tuple[int, int]
    mask: np.ndarray
    box: tuple[int, int, int, int]
    covers: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """An image with what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        objects: from the back to the front.
        captions: five, each with the claims that it makes.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    captions: tuple[Caption, ...]


def render(seed: int, index: int, size: int = 128, max_objects: int = MOST_OBJECTS) -> Scene:
    """Image `index` of the world `seed`: a pure function of its arguments.

    Args:
        seed, index: not negative.
        size: side of the square image in pixels, 64 to 512.
        max_objects: at most so many objects, 1 to 6.
    """
    seed, size, max_objects = check_world(seed, size, max_objects)
    index = _whole_number("index", index, 0, None)
    rng = _generator("scene", seed, index, size, max_objects)
    canvas = shapes_draw.background(rng, size)
    objects = _place_objects(rng, canvas, size, rng.randint(1, max_objects + 1))
    image = shapes_draw.finish(rng, canvas)
    captions = write_captions(_generator("captions", seed, index, size, max_objects), objects, size)
    return Scene(image, objects, captions)


def check_world(seed: int, size: int, max_objects: int) -> tuple[int, int, int]:
    """The arguments of `render` that hold for a whole world, as plain integers."""
    return (
        _whole_number("seed", seed, 0, None),
        _whole_number("size", size, SMALLEST, LARGEST),
        _whole_number("max_objects", max_objects, 1, MOST_OBJECTS),
    )


def _place_objects(
    rng: np.random.RandomState, canvas: np.ndarray, size: int, count: int
) -> tuple[SceneObject, ...]:
    """Paint up to `count` objects onto the canvas, each where it hides none too much.

    All are placed before any is painted, so that what is chosen for an object (a colour unlike
    its surroundings, a pattern that shows) is chosen for the part of it that is seen.
    """
    placed: list[dict] = []
    for _ in range(count):
        for _ in range(_TRIES):
            word = SIZES[rng.randint(len(SIZES))]
            low, high = _RADII[word]
            radius = size * rng.randint(low, high + 1) // 100
            center = tuple(int(v) for v in rng.randint(radius, size - radius + 1, size=2))
            name = CLASSES[rng.randint(len(CLASSES))]
            mask = shapes_draw.rasterize(name, center, radius, rng.randint(-25, 26), size)
            hidden = [np.count_nonzero(other["mask"] & mask) for other in placed]
            if all(
                100 * (np.count_nonzero(other["mask"]) - lost) >= _LEAST_VISIBLE * other["area"]
                for other, lost in zip(placed, hidden)
            ):
                break
        else:
            continue  # the image is full
        for other in placed:
            other["mask"] &= ~mask
        area = np.count_nonzero(mask)
        item = {"name": name, "size": word, "center": center, "radius": radius, "mask": mask}
        placed.append(item | {"area": area, "hidden": hidden})
    objects: list[SceneObject] = []
    for item in placed:
        grown = _grown(item["mask"])
        touching = {
            i: np.count_nonzero(grown & other.mask)
            for i, other in enumerate(objects)
            if (grown & other.mask).any()
        }
        color, pattern = shapes_draw.fill(
            rng,
            canvas,
            item["mask"],
            item["center"],
            item["radius"],
            avoid=tuple(objects[i].color for i in touching),
        )
        covers = tuple(
            i
            for i, border in touching.items()
            if 100 * item["hidden"][i] >= _LEAST_HIDDEN * placed[i]["area"] and border >= size // 16
        )
        said = {key: item[key] for key in ("name", "size", "center", "mask")}
        box = _box(item["mask"])
        objects.append(SceneObject(**said, color=color, pattern=pattern, box=box, covers=covers))
    return tuple(objects)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask with the pixels beside it, in four directions."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def _generator(*key: str | int) -> np.random.RandomState:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def _whole_number(name: str, value: int, low: int, high: int | None) -> int:
    """A plain int, because numpy's are spelled otherwise, and the spelling seeds `_generator`."""
    wanted = f"at least {low}" if high is None else f"{low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(
            f"shapes: {name} is {value!r}; expected a whole number, {wanted}."
        ) from None
    if number < low or (high is not None and number > high):
        raise InputError(f"shapes: {name} is {number}; expected {wanted}.")
    return number
