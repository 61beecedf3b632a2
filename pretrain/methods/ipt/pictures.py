"""Pictures that set an image beside what a network made of it."""

import os

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

PANEL = 384  # width of a column, pixels
DETAIL = 96  # side of the detail that is enlarged, pixels of the result
_MARGIN, _TITLE = 16, 34
_PAPER, _INK, _MARK = (255, 255, 255), (25, 25, 25), (255, 60, 0)


def compare(panels: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """Images of one size side by side, and below each the same detail, enlarged.

    The detail is where the first two differ most.

    Args:
        panels: title and (3, H, W) on the scale 0-255 of each, at least two.
    """
    images = [_as_image(pixels) for _, pixels in panels]
    box = _most_changed(panels[0][1], panels[1][1])
    rows = [ImageOps.contain(image, (PANEL, PANEL)) for image in images]
    ratio = rows[0].width / images[0].width
    details = [
        ImageOps.contain(image.crop(box), (PANEL, PANEL), Image.Resampling.NEAREST)
        for image in images
    ]
    top, below = _MARGIN + _TITLE, 2 * _MARGIN + _TITLE + rows[0].height
    width = _MARGIN + len(panels) * (PANEL + _MARGIN)
    picture = Image.new("RGB", (width, below + details[0].height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, ((title, _), image, detail) in enumerate(zip(panels, rows, details)):
        x = _MARGIN + number * (PANEL + _MARGIN)
        draw.text((x + PANEL // 2, top - 10), title, _INK, _font(18), "ms")
        left = x + (PANEL - image.width) // 2
        picture.paste(image, (left, top))
        mark = [left + box[0] * ratio, top + box[1] * ratio]
        mark += [left + box[2] * ratio - 1, top + box[3] * ratio - 1]
        draw.rectangle(mark, outline=_MARK, width=2)
        picture.paste(detail, (x + (PANEL - detail.width) // 2, below))
    return picture


def _most_changed(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square in which two images differ most."""
    change = (after - before).abs().mean(0, keepdim=True)[None]  # (1, 1, H, W)
    side = min(DETAIL, *change.shape[2:])
    means = F.avg_pool2d(change, side, max(side // 4, 1))[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    x, y = (place * max(side // 4, 1) for place in (column, row))
    return x, y, x + side, y + side


def _as_image(pixels: torch.Tensor) -> Image.Image:
    levels = pixels.clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib  # slow to import

    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )
