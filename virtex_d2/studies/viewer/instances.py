"""One object on an image, and its mask in every form that files have."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image

# What became of an object in matching. "" is before it.
VERDICTS = ("", "found", "missed", "right", "wrong", "ignored", "broken")


@dataclass(frozen=True)
class Instance:
    """One object, true or predicted.

    Attributes:
        category: its category id.
        box: (x0, y0, x1, y1) in pixels of the image.
        segmentation: its mask in COCO's forms (polygons, run lengths); None: no mask.
        score: 0 to 1 of a prediction; None of a true object.
        ignore: of a true object, whether it counts neither as missed nor for a prediction: COCO's
            crowds, VOC's difficult ones.
        crowd: whether it is a region of many objects.
        verdict: of VERDICTS. A true object is found, missed or ignored; a prediction is right,
            wrong or ignored. "broken" is an annotation that fails its data set's check.
    """

    category: Hashable
    box: tuple[float, float, float, float]
    segmentation: Any = None
    score: float | None = None
    ignore: bool = False
    crowd: bool = False
    verdict: str = ""


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO segmentation (polygons, RLE, or RLE with plain counts) as compressed RLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as (height, width) bool."""
    return coco_mask.decode(to_rle(segmentation, height, width)) > 0


def read_pixels(path: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as its EXIF data says, as detectron2 reads it."""
    try:
        return np.asarray(read_image(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read this image: {error}") from error
