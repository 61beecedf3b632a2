"""Objects on an image, with labels that can be read."""

import colorsys
import functools
import os
from collections.abc import Hashable, Mapping, Sequence

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from virtex_d2.studies.viewer.instances import Instance, to_mask

# Told apart by people of any colour vision; the line (dashed, thin) says the same.
COLORS = {
    "found": "#0A5FA5",
    "right": "#0A5FA5",
    "wrong": "#D4500B",
    "missed": "#C2127E",
    "ignored": "#6B7075",
    "broken": "#D00000",
}
_DASHED = ("missed", "broken", "ignored")
_FILLED = ("", "right", "found")
_FONT_SIZE, _PADDING = 13, 3  # pixels
_CROWDED, _SMALL_FONT = 12, 11  # above so many labels they are smaller
_SUPERSAMPLE = 3  # fraction bits of OpenCV's coordinates
_DASH = 9.0  # pixels


def draw_instances(
    image: np.ndarray,
    instances: Sequence[Instance],
    categories: Mapping[Hashable, str],
    *,
    side: int | None = None,
    boxes: bool = True,
    masks: bool = True,
    labels: bool = True,
) -> np.ndarray:
    """Draw objects on an image.

    An object without a verdict has the colour of its category. With one it has the verdict's
    colour of COLORS, missed ones dashed; then the last to be drawn, on top, are the errors. A
    label stands where it hides no other; where there is no such place left, it is left out,
    smallest objects first.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: in the image's coordinates.
        categories: names by category id, for the labels.
        side: the longer side of the result in pixels, so that labels of a small image can be read;
            None: as the image.
        boxes, masks, labels: what to draw. An object without a mask has its box drawn anyway.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width) if side else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.LANCZOS
    canvas = np.array(Image.fromarray(image).resize(size, method) if scale != 1 else image)
    ordered = sorted(instances, key=_drawn_first)
    names = list(categories)
    numbers = {key: number for number, key in enumerate(names)}
    for item in ordered:
        color = instance_color(item, numbers.get(item.category, len(names)))
        masked = masks and bool(item.segmentation)
        if masked:
            _draw_mask(canvas, to_mask(item.segmentation, height, width), color, item.verdict)
        if boxes or not masked:
            x0, y0, x1, y1 = (value * scale for value in item.box)
            corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
            _draw_outline(
                canvas, corners, color, item.verdict, thin=masked and item.verdict not in _DASHED
            )
    if labels:
        _draw_labels(canvas, ordered, categories, numbers, scale)
    return canvas


def instance_color(item: Instance, number: int = 0) -> tuple[int, int, int]:
    """RGB of an object: of its verdict, or of the category's `number`."""
    if item.verdict:
        return ImageColor.getrgb(COLORS[item.verdict])
    # Hues a golden angle apart: neighbours in number are far apart in colour.
    hue, shade = (0.58 + 0.618034 * number) % 1, number % 3
    rgb = colorsys.hls_to_rgb(hue, (0.36, 0.44, 0.3)[shade], (0.85, 0.7, 1.0)[shade])
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    darker = min(1.0, 0.4 / luminance)  # white text is to be read on it
    return tuple(round(255 * darker * part) for part in rgb)


def label_font(size: int = _FONT_SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it knows most alphabets."""
    return _font(size, bold)


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _drawn_first(item: Instance) -> tuple[int, float]:
    x0, y0, x1, y1 = item.box
    rank = {"ignored": 0, "wrong": 2, "missed": 2, "broken": 2}
    return rank.get(item.verdict, 1), -abs((x1 - x0) * (y1 - y0))


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, color: tuple, verdict: str) -> None:
    """In place. `mask` is of the image's size, the canvas's may be another."""
    height, width = canvas.shape[:2]
    soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    inside = (soft > 0.5).astype(np.uint8)
    if verdict in _FILLED:
        covered = inside.astype(bool)
        canvas[covered] = (0.62 * canvas[covered] + 0.38 * np.array(color)).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        _draw_outline(canvas, contour[:, 0].astype(float), color, verdict)


def _draw_outline(
    canvas: np.ndarray, points: np.ndarray, color: tuple, verdict: str, thin: bool = False
) -> None:
    """A closed line through (N, 2) points on a paler one, so that it is seen on any ground."""
    points = np.clip(points, -4 * max(canvas.shape), 4 * max(canvas.shape))  # a broken box's
    lines = _dashes(points) if verdict in _DASHED else [np.vstack([points, points[:1]])]
    fixed = [np.round(line * 2**_SUPERSAMPLE).astype(np.int32)[:, None] for line in lines]
    width = 1 if thin else 2
    for ink, thickness in (((255, 255, 255), width + 2), (color, width)):
        if ink != color and thin:
            continue
        cv2.polylines(canvas, fixed, False, ink, thickness, cv2.LINE_AA, _SUPERSAMPLE)


def _dashes(points: np.ndarray) -> list[np.ndarray]:
    """Every other piece of a closed line."""
    closed = np.vstack([points, points[:1]])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    count = max(3, int(length[-1] / (2 * _DASH)))
    dash = length[-1] / (2 * count)
    pieces = []
    for number in range(count):
        start = 2 * number * dash
        inner = length[(length > start) & (length < start + dash)]
        at = np.concatenate([[start], inner, [start + dash]])
        pieces.append(np.column_stack([np.interp(at, length, closed[:, axis]) for axis in (0, 1)]))
    return pieces


def _draw_labels(
    canvas: np.ndarray,
    ordered: Sequence[Instance],
    categories: Mapping[Hashable, str],
    numbers: Mapping[Hashable, int],
    scale: float,
) -> None:
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font_size = _SMALL_FONT if len(ordered) > _CROWDED else _FONT_SIZE
    font = label_font(font_size)
    height, width = canvas.shape[:2]
    placed: list[tuple[float, float, float, float]] = []
    # Errors first, then the largest: they are sure of a place.
    for item in sorted(ordered, key=lambda item: (-_drawn_first(item)[0], _drawn_first(item)[1])):
        text = str(categories.get(item.category, f"category {item.category}"))
        if item.crowd:
            text += " (crowd)"
        if item.score is not None:
            text += f" {item.score:.2f}"
        extent = font.getlength(text) + 2 * _PADDING, font_size + 2 * _PADDING
        place = _place([value * scale for value in item.box], extent, (width, height), placed)
        if place is None:
            continue
        placed.append(place)
        color = instance_color(item, numbers.get(item.category, len(numbers)))
        dashed = item.verdict in _DASHED
        fill, ink = ((255, 255, 255), color) if dashed else (color, (255, 255, 255))
        draw.rectangle(place, fill=fill, outline=color if dashed else None)
        draw.text((place[0] + _PADDING, (place[1] + place[3]) / 2), text, ink, font, anchor="lm")
    canvas[:] = np.asarray(picture)


def _place(
    box: Sequence[float],
    extent: tuple[float, float],
    size: tuple[int, int],
    placed: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """A rectangle for a label at its box, within the picture and clear of the others."""
    x0, y0, x1, y1 = box
    width, height = extent
    corners = [
        (x0, y0 - height),
        (x0, y0),
        (x0, y1),
        (x0, y1 - height),
        (x1 - width, y0 - height),
        (x1 - width, y0),
        (x1 - width, y1),
        ((x0 + x1 - width) / 2, (y0 + y1 - height) / 2),
        (x1, y0),
        (x0 - width, y0),
    ]
    for x, y in corners:
        x = min(max(x, 0), size[0] - 1 - width)
        y = min(max(y, 0), size[1] - 1 - height)
        place = x, y, x + width, y + height
        if x >= 0 and y >= 0 and not any(_meet(place, other) for other in placed):
            return place
    return None


def _meet(first: Sequence[float], second: Sequence[float]) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )
