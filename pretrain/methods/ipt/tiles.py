"""Images of any size through a network that sees patches of one size.

An image is cut into tiles that overlap, and each pixel of the result is a weighted mean of the
tiles that hold it. What weight a tile has is said along each axis; both together are the product.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from virtex_d2.engine.errors import InputError

Restore = Callable[[torch.Tensor], torch.Tensor]

# Pixels between tiles of 48 pixels; in proportion for others.
RELEASED, SPARSE = 12, 36
STRIDES = (RELEASED, SPARSE)


class Axis(NamedTuple):
    """The tiles along one axis.

    Attributes:
        starts: first pixel of each, in the input.
        weights: (tiles, k * patch) float32, of each of its pixels in the result; those of all tiles
            sum to 1 everywhere.
        top: the weights that columns have in the first quarter of the first row of tiles.
    """

    starts: list[int]
    weights: torch.Tensor
    top: torch.Tensor


def restore_tiled(
    restore: Restore,
    image: torch.Tensor,
    patch: int,
    scale: int,
    stride: int = RELEASED,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda tiles: None,
) -> torch.Tensor:
    """Restore an image by tiles.

    Besides the image and 12 bytes for each pixel of the result, it takes the memory of one batch.

    Args:
        restore: (N, 3, P, P) -> (N, 3, kP, kP).
        image: (3, H, W) float32 on the CPU. Smaller than a patch, it is continued by its mirror
            image, and the result cut.
        patch: P, pixels.
        scale: k.
        stride: 12, by the rule of the released code, which restores each pixel sixteen times; or
            36, which keeps the middle of each tile, 1.8 times. Both for patches of 48 pixels, and
            in proportion for others.
        batch_size: tiles at a time.
        progress: is told how many tiles are done, after each batch.

    Returns:
        (3, kH, kW) float32 on the CPU.
    """
    height, width = image.shape[1:]
    image = _at_least(image, patch)
    rows, columns = (_axis(size, patch, scale, stride) for size in image.shape[1:])
    side = patch * scale
    result = image.new_zeros(3, image.shape[1] * scale, image.shape[2] * scale)
    for places in _batches(len(rows.starts), len(columns.starts), batch_size):
        tiles = []
        for i, j in places:
            y, x = rows.starts[i], columns.starts[j]
            tiles.append(image[:, y : y + patch, x : x + patch])
        restored = restore(torch.stack(tiles)).float().cpu()  # (N, 3, kP, kP)
        for (i, j), tile in zip(places, restored, strict=True):
            y, x = rows.starts[i] * scale, columns.starts[j] * scale
            tile = tile * _weights(rows, columns, i, j)
            result[:, y : y + side, x : x + side] += tile
        progress(len(places))
    return result[:, : height * scale, : width * scale]


def count_tiles(height: int, width: int, patch: int, stride: int = RELEASED) -> int:
    """How many tiles `restore_tiled` restores of an image of this size."""
    rows, columns = (len(_starts(max(size, patch), patch, stride)) for size in (height, width))
    return rows * columns


def self_ensemble(restore: Restore, image: torch.Tensor) -> torch.Tensor:
    """Mean of what becomes of an image and of its seven mirrored and turned copies, turned back.

    "x8" of the released code (`forward_x8`).

    Args:
        restore: (3, H, W) -> (3, kH, kW).
        image: (3, H, W).
    """
    total = None
    for transposed in (False, True):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            seen = image.flip(axes)
            restored = restore(seen.transpose(-2, -1).contiguous() if transposed else seen)
            restored = restored.transpose(-2, -1) if transposed else restored
            total = restored.flip(axes) if total is None else total.add_(restored.flip(axes))
    return total.div_(8)


def _at_least(image: torch.Tensor, patch: int) -> torch.Tensor:
    for axis, size in enumerate(image.shape[1:], 1):
        if size < patch:
            places = np.pad(np.arange(size), (0, patch - size), "reflect")
            image = image.index_select(axis, torch.from_numpy(places))
    return image


def _starts(size: int, patch: int, stride: int) -> list[int]:
    """First pixels of the tiles: at equal distances, and one at the very end."""
    if stride == RELEASED and patch % 4:
        raise InputError(
            f"The released rule needs patches that can be cut in four, found patches of {patch} "
            f"pixels. Take --stride {SPARSE}."
        )
    step = patch * stride // 48
    starts = list(range(0, size - patch + 1, step))
    return starts if starts[-1] == size - patch else [*starts, size - patch]


def _axis(size: int, patch: int, scale: int, stride: int) -> Axis:
    axis = _released if stride == RELEASED else _sparse
    return axis(_starts(size, patch, stride), size, patch, scale)


def _released(starts: list[int], size: int, patch: int, scale: int) -> Axis:
    """As `forward_chop` of the released code (`model/__init__.py`) does.

    A pixel is the mean of the regular tiles that hold it in their middle half; the first quarter of
    the first tile is that tile's alone, and the last tile has all from the middle of what it shares
    with the regular ones on.
    """
    margin, cut = patch // 4, (size - patch) % (patch // 4)
    weights = torch.zeros(len(starts), patch * scale)
    regular = starts[:-1] if cut else starts
    inner = slice(margin * scale, (patch - margin) * scale)
    weights[: len(regular), inner] = 1
    weights[0, : inner.start] = 1
    _normalize(weights, starts, size, scale)
    end = (size - cut) * scale - (patch - cut) * scale // 2
    for start, row in zip(starts, weights):
        row[max(end - start * scale, 0) :] = 0
    weights[-1, end - starts[-1] * scale :] = 1
    # what the released code does at the top, where it takes the first tile as far as it reaches
    top, reach = weights.clone(), min(patch * scale, end)
    for start, row in zip(starts, top):
        row[: max(reach - start * scale, 0)] = float(start == 0)
    return Axis(starts, weights, top)


def _sparse(starts: list[int], size: int, patch: int, scale: int) -> Axis:
    """Neighbours meet in the middle of what they share."""
    weights = torch.zeros(len(starts), patch * scale)
    meet = [(a + patch + b) * scale // 2 for a, b in itertools.pairwise(starts)]
    for start, row, first, last in zip(starts, weights, [0, *meet], [*meet, size * scale]):
        row[first - start * scale : last - start * scale] = 1
    return Axis(starts, weights, weights)


def _normalize(weights: torch.Tensor, starts: list[int], size: int, scale: int) -> None:
    """Divide by what all tiles together have of a pixel, where any has something."""
    total = torch.zeros(size * scale)
    views = [total[start * scale :][: weights.shape[1]] for start in starts]
    for view, row in zip(views, weights):
        view += row
    for view, row in zip(views, weights):
        row /= view.clamp(min=1)


def _weights(rows: Axis, columns: Axis, i: int, j: int) -> torch.Tensor:
    """(kP, kP) of the tile in row i and column j."""
    weights = torch.outer(rows.weights[i], columns.weights[j])
    if i == 0:
        quarter = len(weights) // 4
        weights[:quarter] = torch.outer(rows.weights[0, :quarter], columns.top[j])
    return weights


def _batches(rows: int, columns: int, size: int) -> Iterator[list[tuple[int, int]]]:
    places = [(i, j) for i in range(rows) for j in range(columns)]
    for start in range(0, len(places), size):
        yield places[start : start + size]
