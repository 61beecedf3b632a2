"""COCO's masks, looked at before anything trusts them."""

import math
from typing import Any

import numpy as np

from virtex_d2.annotations.table import is_number

_LEAST = 6  # numbers of a polygon: three points


def mask_fault(mask: Any, size: tuple[int, int]) -> str:
    """Why a mask cannot be painted on an image; "" where it can.

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
    """What makes a list no polygons of COCO's, [[x0, y0, x1, y1, ...], ...]; "" where nothing."""
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
    """A run-length mask of COCO's, compressed or not -> its runs, and (height, width).

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
    """COCO's compressed counts (cocoapi, maskApi.c): 5 bits a character, least significant first;
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
