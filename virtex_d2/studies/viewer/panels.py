"""Images side by side with titles, and a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from virtex_d2.studies.viewer.drawing import COLORS, label_font

_PAPER, _INK, _MUTED = (255, 255, 255), (32, 33, 36), (95, 99, 104)
_GAP, _TITLE = 8, 22  # pixels
LEGEND = {
    "right": "right, and the object that it found",
    "wrong": "wrong: of no object, another class, or a second time",
    "missed": "missed object",
    "ignored": "not counted (crowd, difficult, class not verified)",
}


def grid(panels: Sequence[tuple[str, np.ndarray]], columns: int, heading: str = "") -> Image.Image:
    """Images in rows, each with its title above.

    Args:
        panels: (title, (h, w, 3) uint8 RGB). Places are of the widest and the row's highest image.
        columns: how many in a row.
        heading: a line above all.
    """
    columns = max(1, min(columns, len(panels)))
    width = max(image.shape[1] for _, image in panels)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(image.shape[0] for _, image in row) for row in rows]
    top = 32 if heading else 0
    size = (
        _GAP + columns * (width + _GAP),
        top + _GAP + sum(_TITLE + height + _GAP for height in heights),
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text(
            (_GAP, _GAP + 4), _cut(heading, size[0] - 2 * _GAP, 16), _INK, label_font(16, True)
        )
    y = top + _GAP
    for row, height in zip(rows, heights):
        for column, (title, image) in enumerate(row):
            x = _GAP + column * (width + _GAP)
            draw.text((x, y + 2), _cut(title, width, 13), _INK, label_font(13))
            sheet.paste(Image.fromarray(image), (x, y + _TITLE))
        y += _TITLE + height + _GAP
    return sheet


def with_legend(picture: Image.Image) -> Image.Image:
    """The picture with what its colours mean below."""
    font, line = label_font(12), 20
    result = Image.new("RGB", (picture.width, picture.height + len(LEGEND) * line + _GAP), _PAPER)
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    for number, (verdict, words) in enumerate(LEGEND.items()):
        y = picture.height + number * line + line // 2
        if verdict in ("right", "wrong"):
            draw.line([(_GAP, y), (_GAP + 30, y)], COLORS[verdict], 3)
        else:
            for x in (0, 12, 24):
                draw.line([(_GAP + x, y), (_GAP + x + 6, y)], COLORS[verdict], 3)
        draw.text((_GAP + 40, y), _cut(words, picture.width - 60, 12), _MUTED, font, anchor="lm")
    return result


def _cut(text: str, width: int, size: int) -> str:
    font = label_font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
