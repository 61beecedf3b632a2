"""A synthetic captioned world: an endless, seeded source of images, masks and captions.

For the demo and the tests, where no photographs are. A seed gives the same scenes on every machine:
all random numbers come from numpy's `RandomState`, whose stream is frozen, and pixels are made by
integer arithmetic. Floating-point routines differ in the last bit between processors and library
versions; their one use is the table of outlines, rounded to 1/1024 of a radius.
"""

import hashlib
import math
import operator
from dataclasses import dataclass

import cv2
import numpy as np

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes import LARGEST, MOST_OBJECTS, SMALLEST
from virtex_d2.studies.shapes.captions import SceneObject, write_captions

COLORS = {
    "red": (205, 45, 45),
    "green": (45, 165, 65),
    "blue": (50, 85, 215),
    "yellow": (225, 205, 55),
    "purple": (140, 60, 175),
    "orange": (235, 130, 40),
    "pink": (240, 140, 190),
    "cyan": (60, 200, 205),
    "white": (238, 238, 238),
    "black": (28, 28, 28),
}
PATTERNS = ("plain", "striped", "checkered", "dotted")

_UNIT = 1024  # outlines: parts of a radius
_SUB = 16  # rasterizing: parts of a pixel
_COLOR_JITTER = 18
# An object's colour differs so much (in one channel) from so many (percent) of the background's
# pixels behind it.
_CONTRAST, _CONTRASTING = 45, 80
# Of a pattern's two tones, each has at least this share (percent) of what is seen of the object.
_LEAST_TONE = 20
_NOISE = (4, 22)

SIZES = ("small", "medium", "large")
# Radius of an object by its size, in percent of the image's side.
_RADII = {"small": (9, 12), "medium": (14, 18), "large": (21, 26)}
# An object whose visible share (percent) would fall below this is not painted over.
_LEAST_VISIBLE = 60
_TRIES = 12
# "In front of" is said where at least this share (percent) of the other is hidden.
_LEAST_HIDDEN = 5


@dataclass(frozen=True)
class Scene:
    """An image with what is in it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    objects: tuple[SceneObject, ...]  # from the back to the front
    captions: tuple[str, ...]  # five sentences that are true of it


def render(seed: int, index: int, size: int = 128, max_objects: int = MOST_OBJECTS) -> Scene:
    """Make image `index` of the world `seed`: a pure function of its arguments.

    Args:
        seed, index: not negative.
        size: side of the square image in pixels, 64 to 512.
        max_objects: at most so many objects, 1 to 6.
    """
    seed, size, max_objects = check_world(seed, size, max_objects)
    index = _whole_number("index", index, 0, None)
    rng = _generator("scene", seed, index, size, max_objects)
    canvas = background(rng, size)
    objects = _place_objects(rng, canvas, size, rng.randint(1, max_objects + 1))
    image = finish(rng, canvas)
    captions = write_captions(_generator("captions", seed, index, size, max_objects), objects, size)
    return Scene(image, objects, captions)


def check_world(seed: int, size: int, max_objects: int) -> tuple[int, int, int]:
    """Return the arguments of `render` that hold for a whole world, as plain integers."""
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
            mask = rasterize(name, center, radius, rng.randint(-25, 26), size)
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
        pixels = item["mask"].astype(np.uint8)
        grown = cv2.dilate(pixels, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
        borders = [np.count_nonzero(grown.astype(bool) & other.mask) for other in objects]
        touching = {i: border for i, border in enumerate(borders) if border}
        avoid = tuple(objects[i].color for i in touching)
        place = item["center"], item["radius"]
        color, pattern = fill(rng, canvas, item["mask"], *place, avoid)
        covers = tuple(
            i
            for i, border in touching.items()
            if 100 * item["hidden"][i] >= _LEAST_HIDDEN * placed[i]["area"] and border >= size // 16
        )
        said = {key: item[key] for key in ("name", "size", "center", "mask")}
        box = cv2.boundingRect(pixels)
        objects.append(SceneObject(**said, color=color, pattern=pattern, box=box, covers=covers))
    return tuple(objects)


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


def _points(count: int, radii: tuple[float, ...], start: float = -90) -> list[tuple[float, float]]:
    """Points around a circle, clockwise from `start` degrees, at alternating radii."""
    turns = [math.radians(start + 360 * i / count) for i in range(count)]
    lengths = [radii[i % len(radii)] for i in range(count)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(lengths, turns)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 36 for i in range(36)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turns
    ]


def _crescent() -> list[tuple[float, float]]:
    outer = [(math.cos(t), math.sin(t)) for t in (math.radians(a) for a in range(50, 311, 10))]
    inner = [
        (0.36 + 0.82 * math.cos(t), 0.82 * math.sin(t))
        for t in (math.radians(a) for a in range(290, 69, -10))
    ]
    return outer + inner


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1), (arm, -1), (arm, -arm)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


_CIRCLE = _points(48, (1,))
_ARROW = [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)]

# Contours by class, in radii; a point inside an odd number of contours belongs to the shape.
_OUTLINES = {
    "circle": [_CIRCLE],
    "square": [_points(4, (1,), -45)],
    "triangle": [_points(3, (1,))],
    "diamond": [[(0.62 * x, y) for x, y in _points(4, (1,))]],
    "pentagon": [_points(5, (1,))],
    "star": [_points(10, (1, 0.42))],
    "cross": [_cross(0.3)],
    "ring": [_CIRCLE, [(0.55 * x, 0.55 * y) for x, y in _CIRCLE]],
    "heart": [_heart()],
    "crescent": [_crescent()],
    "arrow": [_ARROW],
    "oval": [[(x, 0.5 * y) for x, y in _CIRCLE]],
    "frame": [_points(4, (1,), -45), _points(4, (0.58,), -45)],
    "bolt": [
        [(0.1, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25), (0.5, -1)]
    ],
}
CLASSES = tuple(_OUTLINES)
_TABLE = {
    name: [np.array([[round(_UNIT * v) for v in point] for point in contour]) for contour in shape]
    for name, shape in _OUTLINES.items()
}
_COS = [round(_UNIT * math.cos(math.radians(a))) for a in range(360)]
_SIN = [round(_UNIT * math.sin(math.radians(a))) for a in range(360)]


def rasterize(
    name: str, center: tuple[int, int], radius: int, degrees: int, size: int
) -> np.ndarray:
    """Make the mask of a shape: (size, size) bool, true where a pixel's centre is inside.

    Args:
        center: (x, y) in pixels.
        radius: in pixels.
        size: side of the image in pixels.
    """
    cos, sin = _COS[degrees % 360], _SIN[degrees % 360]
    turn = np.array([[cos, sin], [-sin, cos]])
    contours = [
        contour @ turn * (radius * _SUB) // (_UNIT * _UNIT) + np.array(center) * _SUB
        for contour in _TABLE[name]
    ]
    x0, y0 = np.concatenate(contours).T
    x1, y1 = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours]).T
    # each pixel row's centre line crosses some edges; left of a crossing is outside, right inside
    centers = np.arange(size)[:, None] * _SUB + _SUB // 2
    crosses = (y0 <= centers) != (y1 <= centers)
    rows, edges = np.nonzero(crosses)
    height = (y1 - y0)[edges]
    run = (centers[rows, 0] - y0[edges]) * (x1 - x0)[edges]
    crossing = x0[edges] + run // height
    columns = np.clip(-((_SUB // 2 - crossing) // _SUB), 0, size)  # first centre at or behind it
    toggles = np.zeros((size, size + 1), np.int64)
    np.add.at(toggles, (rows, columns), 1)
    return (np.cumsum(toggles, axis=1)[:, :size] & 1).astype(bool)


def fill(
    rng: np.random.RandomState,
    canvas: np.ndarray,
    mask: np.ndarray,
    center: tuple[int, int],
    radius: int,
    avoid: tuple[str, ...],
) -> tuple[str, str]:
    """Paint a mask onto the canvas (H, W, 3) int32, in place, in two tones of a colour.

    Args:
        rng: the only source of chance.
        mask: (H, W) bool, what is seen of the object.
        center, radius: of the object, in pixels; the pattern is laid out by them.
        avoid: colours not to take; fewer than there are.

    Returns:
        the colour, one that the background behind lets be seen, and the pattern, one that the mask
        is wide enough to show.
    """
    rows, columns = np.nonzero(mask)
    jitter = rng.randint(-_COLOR_JITTER, _COLOR_JITTER + 1, size=3)
    color = _visible_color(rng, canvas[rows, columns], jitter, avoid)
    bright = np.clip(np.array(COLORS[color]) + jitter, 0, 255)
    # the second tone of dark colours is lighter, of the others darker
    dark = bright + 90 if color == "black" else bright * 55 // 100
    second = np.zeros(len(rows), bool)
    pattern = PATTERNS[rng.randint(len(PATTERNS))]
    if pattern != "plain":
        across, along = columns - center[0], rows - center[1]
        second = _second_tone(rng, pattern, across, along, radius)
        share = 100 * np.count_nonzero(second)
        if not _LEAST_TONE * len(rows) <= share <= (100 - _LEAST_TONE) * len(rows):
            pattern, second = "plain", np.zeros(len(rows), bool)
    canvas[rows, columns] = np.where(second[:, None], dark, bright)
    return color, pattern


def _visible_color(
    rng: np.random.RandomState, behind: np.ndarray, jitter: np.ndarray, avoid: tuple[str, ...]
) -> str:
    """A random colour that differs from the pixels behind it (N, 3), or the one that does most."""
    names = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    names = [name for name in names if name not in avoid]
    shares = []
    for name in names:
        difference = np.abs(behind - (np.array(COLORS[name]) + jitter)).max(axis=1)
        shares.append(100 * np.count_nonzero(difference >= _CONTRAST) // len(behind))
        if shares[-1] >= _CONTRASTING:
            return name
    return names[shares.index(max(shares))]


def _second_tone(
    rng: np.random.RandomState, pattern: str, across: np.ndarray, along: np.ndarray, radius: int
) -> np.ndarray:
    """Which pixels (N,) bool have the second tone, by their offsets from the object's centre."""
    if pattern == "striped":
        a, b = ((1, 0), (0, 1), (1, 1), (1, -1))[rng.randint(4)]
        return (a * across + b * along) // max(3, radius // 3) % 2 == 1
    if pattern == "checkered":
        period = max(3, radius // 3)
        return (across // period + along // period) % 2 == 1
    period = max(3, radius // 4)
    x, y = ((v + period) % (2 * period) - period for v in (across, along))
    return 8 * (x * x + y * y) <= 3 * period * period


def background(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Make a textured canvas (size, size, 3) int32, 0 to 255: one of five families."""
    first = rng.randint(50, 200, size=3)
    second = np.clip(first + rng.randint(-70, 71, size=3), 0, 255)
    rows, columns = np.mgrid[:size, :size]
    family = rng.randint(5)
    if family == 0:  # gradient, along a random direction
        a, b = rng.randint(0, 5), rng.randint(1, 5)
        share = (a * rows + b * columns) * 256 // ((a + b) * size)
    elif family == 1:  # stripes
        a, b = rng.randint(-2, 3), rng.randint(1, 3)
        share = (a * rows + b * columns) // max(3, size * rng.randint(4, 12) // 100) % 2 * 256
    elif family == 2:  # checkerboard
        period = max(4, size * rng.randint(5, 14) // 100)
        share = (rows // period + columns // period) % 2 * 256
    elif family == 3:  # clouds
        share = _value_noise(rng, size, int(2 ** rng.randint(2, 5)))
    else:  # clouds of two scales
        share = (_value_noise(rng, size, 4) * 2 + _value_noise(rng, size, 24)) // 3
    return (first * (256 - share[..., None]) + second * share[..., None]) // 256


def _value_noise(rng: np.random.RandomState, size: int, cells: int) -> np.ndarray:
    """Smooth noise 0 to 256: a random grid of `cells` a side, interpolated; (size, size)."""
    grid = rng.randint(0, 257, size=(cells + 1, cells + 1))
    position = np.arange(size) * cells * 256 // size
    cell, weight = position // 256, position % 256
    weight = weight * weight * (3 * 256 - 2 * weight) // 65536  # smoothstep
    along = grid[:, cell] * (256 - weight) + grid[:, cell + 1] * weight
    rows = weight[:, None]
    return (along[cell] * (256 - rows) + along[cell + 1] * rows) // 65536


def finish(rng: np.random.RandomState, canvas: np.ndarray) -> np.ndarray:
    """Blur (none or once) and noise, as a camera would; (H, W, 3) int32 -> uint8."""
    if rng.randint(2):
        for axis in (0, 1):
            edge = np.pad(canvas, [(1, 1) if axis == a else (0, 0) for a in range(3)], "edge")
            ahead, behind = np.split(edge, [2], axis)[1], np.split(edge, [-2], axis)[0]
            canvas = (ahead + 2 * canvas + behind) // 4
    strength = rng.randint(*_NOISE)
    # the sum of two uniform bytes: a triangle, near enough to a normal distribution
    noise = np.frombuffer(rng.bytes(2 * canvas.size), np.uint8).astype(np.int32)
    noise = noise[: canvas.size] + noise[canvas.size :] - 255
    canvas = canvas + noise.reshape(canvas.shape) * strength // 128
    return np.clip(canvas, 0, 255).astype(np.uint8)
