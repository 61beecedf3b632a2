"""What keeps a run from starting on a data set: records that detectron2 stops on or drops."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from virtex_d2.annotations.checks import box_problems, missing_problems
from virtex_d2.annotations.masks import mask_faults
from virtex_d2.annotations.records import shown
from virtex_d2.annotations.table import KINDS, AnnotationTable, Problem
from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.images import missing_files

logger = logging.getLogger(__name__)

_NAMED = 10  # records of a kind that an error names


@dataclass(frozen=True)
class Use:
    """What a run does with a data set: it decides what the records must have."""

    # trains, tests: whether the run learns from it, and is evaluated on it
    trains: bool = True
    tests: bool = True
    masks: bool = False  # whether the detector has a mask head
    # INPUT.MASK_FORMAT, "polygon" or "bitmask" (which takes polygons and RLE)
    mask_format: str = "polygon"
    # the fraction of the annotations whose box or mask may be unusable; they are named in a warning
    max_bad_share: float = 0.0


def require_usable(table: AnnotationTable, use: Use) -> None:
    """Raise InputError for the first of what a run cannot do with; it counts and names records."""
    if not table.image_ids:
        raise InputError(
            f"{table.source}: `images` is empty; there is nothing to train or test on."
        )
    if use.masks and table.kind == "voc":
        raise InputError(
            f"{table.source}: VOC's XML files have boxes and no masks, which MODEL.MASK_ON True "
            "needs. Set MODEL.MASK_ON False."
        )
    problems = [*table.problems, *missing_problems(table, missing_files(table.files))]
    for kinds, advice in _refused(table, use):
        _refuse(table, [problem for problem in problems if problem.kind in kinds], advice)
    advice = "Boxes are [x, y, width, height] in pixels: correct or remove them."
    if table.kind == "voc":
        advice = "Boxes are pixels from 1 to width and height: correct or remove them."
    _refuse(table, list(box_problems(table)), advice, use.max_bad_share)
    if use.masks:
        _require_masks(table, use)
    # Without a mask head, too: detectron2 drops the whole object with its box.
    faults = mask_faults(table).items()
    advice = (
        "Expected a list of polygons [x, y, x, y, ...] of three points or more, or a run-length "
        "mask {counts, size: [height, width]}: correct them, or for boxes alone leave the key out."
    )
    malformed = [table.problem("mask-malformed", row, why) for row, why in faults]
    _refuse(table, malformed, advice, use.max_bad_share)


def _refused(table: AnnotationTable, use: Use) -> Iterable[tuple[tuple[str, ...], str]]:
    """Kinds of problems that are refused, and what to do, in this order."""
    fields = "Numbers are written without quotes; leave out what is not known."
    if table.kind == "voc":
        fields = (
            "Expected size/width, size/height and for each object name and bndbox with xmin, ymin, "
            "xmax, ymax."
        )
    yield ("unreadable", "incomplete", "box-malformed"), fields
    yield ("id-repeated", "category-repeated"), "Give each its own."
    folder = "Check the folder, or remove them from the list."
    if table.kind == "lvis":
        folder = (
            "Give the folder above those that `coco_url` ends with (train2017/..., val2017/...), "
            "or the folder of `file_name` where there is no `coco_url`."
        )
    yield ("image-missing",), f"The set lists {len(table.image_ids)} images. {folder}"
    known = ", ".join(map(shown, sorted(table.categories)[:20]))
    more = ", ..." if len(table.categories) > 20 else ""
    yield (
        ("category-unknown",),
        f"`categories` has {known}{more}. Add the categories, or remove the annotations.",
    )
    yield (
        ("image-unknown",),
        "The file is cut short, or made of two that do not belong together.",
    )
    yield ("ignore-set",), "Mark what should not count with iscrowd 1, or remove it."
    if use.tests:
        yield (
            ("not-evaluable",),
            "Give each image its lists of category ids, [] where there are none, and each category "
            "'r', 'c' or 'f' by the number of its training images: up to 10, up to 100, or more. "
            "Or use the type coco.",
        )


def _require_masks(table: AnnotationTable, use: Use) -> None:
    # A crowd is not learned from, but what is found inside it is not held against a detector.
    singles = np.flatnonzero(~table.crowd)
    bare = [
        table.problem("mask-missing", row, "it has no segmentation")
        for row in (range(len(table.records)) if use.tests else singles)
        if table.segmentations[row] is None
    ]
    _refuse(table, bare, "A mask head needs one: add them, or set MODEL.MASK_ON False.")
    runs = [table.records[row] for row in singles if isinstance(table.segmentations[row], dict)]
    if runs and use.trains and use.mask_format == "polygon":
        raise InputError(
            f"{table.source}: {len(runs)} objects have a run-length mask, but INPUT.MASK_FORMAT is "
            f"polygon: {some(runs, _NAMED, '; ')}. Use INPUT.MASK_FORMAT bitmask."
        )


def _refuse(
    table: AnnotationTable, problems: Sequence[Problem], advice: str, share: float | None = None
) -> None:
    """Refuse problems of more than a share of all objects, if one is given; warn of fewer."""
    if problems and share is not None:
        advice = f"{advice} Or allow a larger share with VIRTEX.MAX_BAD_BOX_SHARE."
    if len(problems) > (share or 0) * len(table.records):
        raise InputError(f"{table.source}: {_told(problems)} {advice}")
    if problems:
        logger.warning("%s: %s They are clipped or left out.", table.source, _told(problems))


def _told(problems: Sequence[Problem]) -> str:
    """ "title (12): first; second; ... and 2 more." of each kind."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(KINDS[problem.kind].title, []).append(str(problem))
    return " ".join(
        f"{title} ({len(items)}): {some(items, _NAMED, '; ')}." for title, items in groups.items()
    )
