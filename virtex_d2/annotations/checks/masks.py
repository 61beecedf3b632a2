"""Masks that cannot be right: polygons and run lengths, in numpy, thousands at a time."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.annotations.checks.boxes import BORDER, overhang
from virtex_d2.annotations.masks import polygon_fault, run_lengths
from virtex_d2.annotations.table import AnnotationTable, Problem

_CHUNK = 20_000  # objects at a time: a bound on the memory for their coordinates
# Boxes are made from masks, to a pixel. Where less than this share is common to both (IoU), they
# are not of one object, or one of the two was not rotated or scaled with the image.
_LEAST_IOU = 0.5


def mask_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Masks that are missing where others are there, unreadable, empty or out of place."""
    kinds = mask_kinds(table)
    if (kinds != "none").any():
        for index in np.flatnonzero((kinds == "none") & ~table.crowd):
            yield table.problem("mask-missing", index, "it has no segmentation")
    for index in np.flatnonzero(kinds == "other"):
        found = type(table.segmentations[index]).__name__
        why = f"expected polygons or a run-length dict, found a {found}"
        yield table.problem("mask-malformed", index, why)
    extents = np.full((len(kinds), 4), np.nan)  # x0, y0, x1, y1
    polygons = np.flatnonzero(kinds == "polygons")
    for start in range(0, len(polygons), _CHUNK):
        yield from _polygon_problems(table, polygons[start : start + _CHUNK], extents)
    for index in np.flatnonzero(kinds == "run-length"):
        yield from _run_length_problems(table, index, extents)
    yield from _places(table, extents)


def mask_kinds(table: AnnotationTable) -> np.ndarray:
    """(M) text: "polygons", "run-length", "none" (as in detectron2, also if empty), "other"."""
    kinds = {list: "polygons", dict: "run-length"}
    found = [kinds.get(type(mask), "other") if mask else "none" for mask in table.segmentations]
    return np.array(found, dtype="U10")


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
    mask = table.segmentations[row]
    try:
        runs, (height, width) = run_lengths(mask)
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
    over = overhang(table, extents[:, :2], extents[:, 2:])
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
