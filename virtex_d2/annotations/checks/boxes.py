"""Boxes that cannot be right, and objects that are there twice."""

from collections.abc import Iterator

import numpy as np

from virtex_d2.annotations.table import AnnotationTable, Problem

# Pixels that a box or mask may reach over the border: rounding, in official files too.
BORDER = 1.0


def box_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Boxes that are no boxes, are empty, or lie outside their image; objects repeated."""
    malformed = np.isnan(table.boxes).any(axis=1)
    for index in np.flatnonzero(malformed):
        yield table.problem("box-malformed", index, "expected [x, y, width, height] in pixels")
    empty = ~malformed & (table.boxes[:, 2:] <= 0).any(axis=1)
    for index in np.flatnonzero(empty):
        yield table.problem("box-empty", index, f"bbox {_written(table.boxes[index])}")
    over = overhang(table, table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:])
    for index in np.flatnonzero(~empty & (over > BORDER)):
        why = (
            f"bbox {_written(table.boxes[index])} reaches {over[index]:.1f} px outside the "
            f"{table.size_of(index)} image"
        )
        yield table.problem("box-outside", index, why)
    yield from _repeated(table, ~malformed & (table.image_of >= 0))


def overhang(table: AnnotationTable, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """By how many pixels the objects' extents reach outside their images.

    Args:
        table: the data set.
        low, high: (M, 2) corners of the extents, [x, y].

    Returns:
        (M), negative inside; -inf where a corner or the image's size is unknown.
    """
    if not len(low):
        return np.empty(0)
    sizes = np.vstack([table.sizes, [[np.nan, np.nan]]])[table.image_of]  # -1: the row of NaN
    over = np.maximum(-low, high - sizes).max(axis=1)
    return np.where(np.isnan(over), -np.inf, over)


def _repeated(table: AnnotationTable, usable: np.ndarray) -> Iterator[Problem]:
    rows = np.flatnonzero(usable)
    keys = np.column_stack([table.image_of[rows], table.category_of[rows], table.boxes[rows]])
    order = np.lexsort(keys.T)  # stable, so that the first of several equal ones comes first
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    first = 0
    for place in np.flatnonzero(same) + 1:
        if not same[place - 2] or place == 1:
            first = order[place - 1]
        original = table.records[rows[first]]
        yield table.problem("object-repeated", rows[order[place]], f"as {original}")


def _written(box: np.ndarray) -> str:
    return f"[{', '.join(f'{value:g}' for value in box)}]"
