"""COCO's masks, looked at before anything trusts them."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.annotations.table import AnnotationTable, Problem, is_number

# Pixels that a box or mask may reach over the border: rounding, in official files too.
BORDER = 1.0
_LEAST = 6  # numbers of a polygon: three points
_CHUNK = 20_000  # objects at a time: a bound on the memory for their coordinates
# Boxes are made from masks, to a pixel. Where less than this share is common to both (IoU), they
# are not of one object, or one of the two was not rotated or scaled with the image.
_LEAST_IOU = 0.5


def mask_fault(mask: Any, size: tuple[int, int]) -> str:
    """Say why a mask cannot be painted on an image; "" where it can.

    Args:
        mask: polygons or a run-length dict.
        size: (height, width) of the image in pixels.
    """
    if isinstance(mask, list):
        if fault := polygon_fault(mask):
            return fault
        # pycocotools walks along the outline pixel by pixel, however far away it is
        far = 4 * max(size)
        if any(max(part) > far or min(part) < -far for part in mask):
            return "a coordinate is far outside the image"
        return ""
    if not isinstance(mask, dict):
        return f"expected polygons or a run-length dict, found a {type(mask).__name__}"
    try:
        _, found = run_lengths(mask)
    except ValueError as error:
        return str(error)
    if found != tuple(size):
        return f"its size is {found[1]}x{found[0]}, that of the image {size[1]}x{size[0]}"
    return ""


def polygon_fault(polygons: list[Any]) -> str:
    """Say why a list is no polygons of COCO's, [[x0, y0, x1, y1, ...], ...]; "" where it is."""
    for part in polygons:
        if type(part) is not list:
            return f"expected a list of polygons [x0, y0, ...], found a {type(part).__name__} in it"
        if len(part) % 2 or len(part) < _LEAST:
            return f"a polygon has {len(part)} numbers; expected an even number, at least {_LEAST}"
        types = set(map(type, part))
        if not types <= {int, float} or (int in types and not all(map(is_number, part))):
            wrong = next(value for value in part if not is_number(value))
            return f"a polygon has the coordinate {wrong!r}; expected numbers"
        if not math.isfinite(sum(part)):
            return "a polygon has a coordinate that is not finite"
    return ""


def run_lengths(mask: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a run-length mask of COCO's, compressed or not, as its runs and (height, width).

    pycocotools trusts what it is given, and reads beyond the end of a text that is cut short; so
    this looks at it first.

    Raises:
        ValueError: it is not one, or its runs do not fill its size; the message says why.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    ) or not all(0 < side < 2**16 for side in size):
        raise ValueError(f"its `size` is {size!r}, expected [height, width]")
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array(counts or [0], object)
    else:
        raise ValueError("its `counts` are neither a text nor a list of whole numbers")
    if runs.min() < 0:
        raise ValueError("a run of its `counts` is negative")
    total = int(runs.sum())
    if total != size[0] * size[1]:
        raise ValueError(f"its runs have {total} pixels, its size {size[1]}x{size[0]} others")
    return runs.astype(np.int64), (size[0], size[1])


def _decompressed(text: str) -> np.ndarray:
    """Decode COCO's counts (cocoapi, maskApi.c): 5 bits a character, least significant first;
    bit 5 says that more follow, bit 4 of the last is the sign; from the fourth count on a count is
    the difference to the one two before.
    """
    codes = np.array([ord(char) for char in text], np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("its `counts` are cut short, or no text of COCO's")
    ends = np.flatnonzero(codes & 32 == 0)
    begins = np.concatenate([[0], ends[:-1] + 1])
    if (ends - begins).max() > 6:
        raise ValueError("its `counts` hold a number that no image has")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(begins, ends - begins + 1))
    counts = np.add.reduceat((codes & 31) << shifts, begins)
    negative = codes[ends] & 16 != 0
    counts[negative] -= 1 << (shifts[ends][negative] + 5)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def mask_faults(table: AnnotationTable) -> dict[int, str]:
    """Find the objects, by index, whose mask cannot be painted on their image, and say why.

    Args:
        table: a data set, the size of whose images is known.
    """
    sizes = [(int(height), int(width)) for width, height in table.sizes.tolist()]
    masks = zip(table.image_of.tolist(), table.segmentations)
    return {
        row: fault
        for row, (image, mask) in enumerate(masks)
        if mask is not None and (fault := mask_fault(mask, sizes[image]))
    }


def mask_kinds(table: AnnotationTable) -> np.ndarray:
    """(M) text: "polygons", "run-length", "none" or "other"."""
    kinds = {list: "polygons", dict: "run-length", type(None): "none"}
    return np.array([kinds.get(type(mask), "other") for mask in table.segmentations], "U10")


def mask_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Masks that are missing where others are there, unreadable, empty or out of place.

    Polygons in numpy, thousands at a time.
    """
    kinds = mask_kinds(table)
    if (kinds != "none").any():
        for index in np.flatnonzero((kinds == "none") & ~table.crowd):
            yield table.problem("mask-missing", index, "it has no segmentation, and others have")
    for index in np.flatnonzero(kinds == "other"):
        yield table.problem("mask-malformed", index, mask_fault(table.segmentations[index], (0, 0)))
    extents = np.full((len(kinds), 4), np.nan)  # x0, y0, x1, y1
    polygons = np.flatnonzero(kinds == "polygons")
    for start in range(0, len(polygons), _CHUNK):
        yield from _polygon_problems(table, polygons[start : start + _CHUNK], extents)
    for index in np.flatnonzero(kinds == "run-length"):
        yield from _run_length_problems(table, index, extents)
    yield from _places(table, extents)


def _polygon_problems(
    table: AnnotationTable, rows: np.ndarray, extents: np.ndarray
) -> Iterator[Problem]:
    sound = []
    for row in rows.tolist():
        if why := polygon_fault(table.segmentations[row]):
            yield table.problem("mask-malformed", row, why)
        else:
            sound.append(row)
    if not sound:
        return
    masks = [table.segmentations[row] for row in sound]
    parts = list(chain.from_iterable(masks))
    # (P, 2) points of all; first point of each part; first part of each mask
    points = np.array(list(chain.from_iterable(parts)), float).reshape(-1, 2)
    begins = _starts([len(part) // 2 for part in parts])
    firsts = _starts([len(mask) for mask in masks])
    following = np.arange(1, len(points) + 1)
    following[np.append(begins[1:], len(points)) - 1] = begins  # the last point's is the first
    x, y = points.T
    with np.errstate(invalid="ignore", over="ignore"):  # where coordinates are huge
        doubled = np.add.reduceat(x * y[following] - x[following] * y, begins)  # shoelace formula
        areas = np.add.reduceat(np.abs(doubled) / 2, firsts)
    low = np.minimum.reduceat(points, begins[firsts])
    high = np.maximum.reduceat(points, begins[firsts])
    extents[sound] = np.concatenate([low, high], axis=1)
    for place in np.flatnonzero(areas < 1e-6):
        yield table.problem("mask-empty", sound[place], "its polygons enclose nothing")
        extents[sound[place]] = np.nan


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)


def _run_length_problems(
    table: AnnotationTable, row: int, extents: np.ndarray
) -> Iterator[Problem]:
    try:
        runs, (height, width) = run_lengths(table.segmentations[row])
    except ValueError as error:
        yield table.problem("mask-malformed", row, str(error))
        return
    image = table.image_of[row]
    if image >= 0 and not np.isnan(table.sizes[image]).any():
        recorded = table.size_of(row)
        if f"{width}x{height}" != recorded:
            why = f"its size is {width}x{height}, that of the image {recorded}"
            yield table.problem("mask-size", row, why)
            return
    if not runs[1::2].sum():
        yield table.problem("mask-empty", row, "no pixel is set")
        return
    compressed = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, 0, 0)
    x, y, box_width, box_height = coco_mask.toBbox(compressed)
    extents[row] = x, y, x + box_width, y + box_height


def _places(table: AnnotationTable, extents: np.ndarray) -> Iterator[Problem]:
    over = table.overhang(extents[:, :2], extents[:, 2:])
    for index in np.flatnonzero(over > BORDER):
        why = f"it reaches {over[index]:.1f} px outside the {table.size_of(index)} image"
        yield table.problem("mask-outside", index, why)
    low, high = table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]
    sides = np.minimum(high, extents[:, 2:]) - np.maximum(low, extents[:, :2])
    common = sides.clip(0).prod(axis=1)
    own = (extents[:, 2:] - extents[:, :2]).prod(axis=1)
    union = table.boxes[:, 2:].prod(axis=1) + own - common
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = common / union < _LEAST_IOU  # False where one of them is unknown
    apart &= (table.boxes[:, 2:] > 0).all(axis=1)
    for index in np.flatnonzero(apart):
        x0, y0, x1, y1 = extents[index]
        box = ", ".join(f"{value:.0f}" for value in table.boxes[index])
        why = f"bbox [{box}], the mask's own [{x0:.0f}, {y0:.0f}, {x1 - x0:.0f}, {y1 - y0:.0f}]"
        yield table.problem("mask-box", index, f"{why}; a rotated or rescaled image?")
