"""Objects on an image, with labels that can be read; images side by side."""

import colorsys
import functools
import os
from collections.abc import Hashable, Mapping, Sequence

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image
from virtex_d2.studies.viewer.matching import Instance, to_mask

# Told apart by people of any colour vision; the line (dashed, thin) says the same.
COLORS = {
    "found": "#0A5FA5",
    "right": "#0A5FA5",
    "wrong": "#D4500B",
    "missed": "#C2127E",
    "ignored": "#6B7075",
    "broken": "#D00000",
}
LEGEND = {
    "right": "right, and the object that it found",
    "wrong": "wrong: of no object, another class, or a second time",
    "missed": "missed object",
    "ignored": "not counted (crowd, difficult, class not verified)",
}
DASHED = ("missed", "broken", "ignored")
_FILLED = ("", "right", "found")
_RANKS = {"ignored": 0, "wrong": 2, "missed": 2, "broken": 2}  # 1: any other
_FRACTION = 3  # bits behind the point in the coordinates that OpenCV is given
_DASH = 9.0  # pixels
_FONT_SIZE, _PADDING = 13, 3  # pixels
_CROWDED, _SMALL_FONT = 12, 11  # above so many labels they are smaller
_PAPER, _INK, _MUTED = (255, 255, 255), (32, 33, 36), (95, 99, 104)
_GAP, _TITLE, _LINE = 8, 22, 20  # pixels


def read_pixels(path: str) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, upright, as detectron2 reads it."""
    try:
        return np.asarray(read_image(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read this image: {error}") from error


def draw_instances(
    image: np.ndarray,
    instances: Sequence[Instance],
    categories: Mapping[Hashable, str],
    *,
    side: int | None = None,
    boxes: bool = True,
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
        boxes, labels: whether to draw them. An object without a mask has its box drawn anyway.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width) if side else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.LANCZOS
    canvas = np.array(Image.fromarray(image).resize(size, method) if scale != 1 else image)
    numbers = {key: number for number, key in enumerate(categories)}
    placed = []
    for item in sorted(instances, key=_drawn_first):
        color = instance_color(item, numbers.get(item.category, len(numbers)))
        x0, y0, x1, y1 = (value * scale for value in item.box)
        placed.append((item, color, (x0, y0, x1, y1)))
        masked = bool(item.segmentation)
        if masked:
            mask = to_mask(item.segmentation, height, width).astype(np.float32)
            inside = cv2.resize(mask, size) > 0.5
            if item.verdict in _FILLED:
                canvas[inside] = 0.62 * canvas[inside] + 0.38 * np.array(color)
            outlines, _ = cv2.findContours(
                inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
            )
            _draw_outlines(canvas, [outline[:, 0] for outline in outlines], color, item.verdict)
        if boxes or not masked:
            corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
            corners = corners.clip(-4 * max(size), 4 * max(size))  # a broken box's
            thin = masked and item.verdict not in DASHED
            _draw_outlines(canvas, [corners], color, item.verdict, thin)
    if not labels:
        return canvas
    picture = Image.fromarray(canvas)
    _draw_labels(picture, placed, categories)
    return np.array(picture)


def instance_color(item: Instance, number: int = 0) -> tuple[int, int, int]:
    """Choose the RGB of an object: of its verdict, or of the category's `number`."""
    if item.verdict:
        return ImageColor.getrgb(COLORS[item.verdict])
    # Hues a golden angle apart: neighbours in number are far apart in colour.
    hue, shade = (0.58 + 0.618034 * number) % 1, number % 3
    rgb = colorsys.hls_to_rgb(hue, (0.36, 0.44, 0.3)[shade], (0.85, 0.7, 1.0)[shade])
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    darker = min(1.0, 0.4 / luminance)  # white text is to be read on it
    return tuple(round(255 * darker * part) for part in rgb)


def grid(panels: Sequence[tuple[str, np.ndarray]], columns: int, heading: str = "") -> Image.Image:
    """Put images in rows, each with its title above.

    Args:
        panels: (title, (h, w, 3) uint8 RGB). Places are of the widest and the row's highest image.
    """
    columns = max(1, min(columns, len(panels)))
    width = max(image.shape[1] for _, image in panels)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(image.shape[0] for _, image in row) for row in rows]
    y = _GAP + (32 if heading else 0)
    size = _GAP + columns * (width + _GAP), y + sum(_TITLE + height + _GAP for height in heights)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        font = _font(16, bold=True)
        draw.text((_GAP, _GAP + 4), _cut(heading, size[0] - 2 * _GAP, font), _INK, font)
    font = _font(13)
    for row, height in zip(rows, heights):
        for column, (title, image) in enumerate(row):
            x = _GAP + column * (width + _GAP)
            draw.text((x, y + 2), _cut(title, width, font), _INK, font)
            sheet.paste(Image.fromarray(image), (x, y + _TITLE))
        y += _TITLE + height + _GAP
    return sheet


def with_legend(picture: Image.Image) -> Image.Image:
    """Put below the picture what its colours mean."""
    font = _font(12)
    size = picture.width, picture.height + len(LEGEND) * _LINE + _GAP
    result = Image.new("RGB", size, _PAPER)
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    for number, (verdict, words) in enumerate(LEGEND.items()):
        y = picture.height + number * _LINE + _LINE // 2
        starts, length = ((0, 12, 24), 6) if verdict in DASHED else ((0,), 30)
        for x in starts:
            draw.line([(_GAP + x, y), (_GAP + x + length, y)], COLORS[verdict], 3)
        draw.text((_GAP + 40, y), _cut(words, size[0] - 60, font), _MUTED, font, anchor="lm")
    return result


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it knows most alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _drawn_first(item: Instance) -> tuple[int, float]:
    x0, y0, x1, y1 = item.box
    return _RANKS.get(item.verdict, 1), -abs((x1 - x0) * (y1 - y0))


def _draw_outlines(
    canvas: np.ndarray,
    outlines: Sequence[np.ndarray],
    color: tuple[int, int, int],
    verdict: str,
    thin: bool = False,
) -> None:
    """Draw closed lines through (N, 2) points, in place; but for thin ones on paler ones, so that
    they are seen on any ground.
    """
    closed = [np.vstack([points, points[:1]]) for points in outlines]
    if verdict in DASHED:
        closed = [dash for line in closed for dash in _dashes(line)]
    fixed = [np.round(line * 2**_FRACTION).astype(np.int32)[:, None] for line in closed]
    for ink, width in [(color, 1)] if thin else [(_PAPER, 4), (color, 2)]:
        cv2.polylines(canvas, fixed, False, ink, width, cv2.LINE_AA, _FRACTION)


def _dashes(line: np.ndarray) -> list[np.ndarray]:
    """Every other piece of a line."""
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    count = max(3, int(length[-1] / (2 * _DASH)))
    pieces = np.linspace(0, length[-1], 2 * count + 1)[:-1].reshape(count, 2)
    at = np.linspace(*pieces.T, 10, axis=1)  # (count, 10)
    return list(np.stack([np.interp(at, length, axis) for axis in line.T], axis=2))


def _draw_labels(
    picture: Image.Image,
    placed: Sequence[tuple[Instance, tuple[int, int, int], Sequence[float]]],
    categories: Mapping[Hashable, str],
) -> None:
    """Label objects, given as drawn, with their colours and boxes on the picture; in place."""
    draw = ImageDraw.Draw(picture)
    font_size = _SMALL_FONT if len(placed) > _CROWDED else _FONT_SIZE
    font = _font(font_size)
    taken: list[tuple[float, float, float, float]] = []
    # Errors first, of each the largest: they are sure of a place.
    for item, color, box in sorted(placed, key=lambda entry: -_RANKS.get(entry[0].verdict, 1)):
        text = str(categories.get(item.category, f"category {item.category}"))
        if item.crowd:
            text += " (crowd)"
        if item.score is not None:
            text += f" {item.score:.2f}"
        extent = font.getlength(text) + 2 * _PADDING, font_size + 2 * _PADDING
        place = _place(box, extent, picture.size, taken)
        if place is None:
            continue
        taken.append(place)
        dashed = item.verdict in DASHED
        fill, ink = (_PAPER, color) if dashed else (color, _PAPER)
        draw.rectangle(place, fill=fill, outline=color if dashed else None)
        draw.text((place[0] + _PADDING, (place[1] + place[3]) / 2), text, ink, font, anchor="lm")


def _place(
    box: Sequence[float],
    extent: tuple[float, float],
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
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
        hidden = any(
            x < right and left < x + width and y < bottom and top < y + height
            for left, top, right, bottom in taken
        )
        if x >= 0 and y >= 0 and not hidden:
            return x, y, x + width, y + height
    return None
