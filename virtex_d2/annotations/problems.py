"""What the checks of all annotation formats share: counting, naming, boxes, absent images."""

import logging
import os
from collections.abc import Sequence

from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

NAMED = 10  # records that an error names
# What messages count, and a single one of it.
_SINGULAR = {
    "annotations have": "annotation has",
    "categories have": "category has",
    "images have": "image has",
    "images are": "images is",
    "fields are": "field is",
    "` have": "` has",
}


def counted(items: Sequence[str], what: str) -> str:
    """ "12 <what>: first; second; ... and 2 more." """
    if len(items) == 1:
        for many, one in _SINGULAR.items():
            what = what.replace(many, one, 1)
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{len(items)} {what}: {'; '.join(items[:NAMED])}{more}."


def refuse(source: str, items: Sequence[str], what: str, advice: str) -> None:
    """Raise InputError if there are items; the message counts them and names the first ten."""
    if items:
        raise InputError(f"{source}: {counted(items, what)} {advice}")


def refuse_more_than(
    share: float, total: int, source: str, items: Sequence[str], what: str, advice: str
) -> None:
    """Refuse items that are more than a share of all; warn of fewer: detectron2 drops or clips."""
    if len(items) > share * total:
        advice = f"{advice} Or allow a larger share with VIRTEX.MAX_BAD_BOX_SHARE."
        refuse(source, items, what, advice)
    if items:
        logger.warning("%s: %s They are clipped or left out.", source, counted(items, what))


def box_fits(x: float, y: float, right: float, bottom: float, width: int, height: int) -> bool:
    """Whether a box encloses something and lies in its image.

    A pixel of rounding is common, in official files too.
    """
    inside = -1 <= x and right <= width + 1 and -1 <= y and bottom <= height + 1
    return inside and x < right and y < bottom


def absent(image_root: str, names: Sequence[str]) -> list[str]:
    """The names (paths below the folder) of which there is no file.

    One listing a folder, not one question an image: network file systems are slow to ask.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, base = os.path.split(os.path.join(image_root, name))
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in present[folder]:
            missing.append(name)
    return missing
