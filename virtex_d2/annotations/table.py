"""The form that every annotation format is read into."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Problem:
    """One record that is broken.

    Attributes:
        kind: of `virtex_d2.annotations.checks.kinds.KINDS`.
        record: which, for people: "annotation 17", "image 5".
        image: the file of its image; "" where the record belongs to none.
        why: what was found, and what was expected.
    """

    kind: str
    record: str
    image: str
    why: str


@dataclass(frozen=True)
class AnnotationTable:
    """A data set's annotations: N images, M objects, in the order of the file.

    Attributes:
        name: of the data set, for people.
        kind: "coco", "lvis" or "voc".
        source: the annotation file, or VOC's list of images.
        categories: names by category id; by the class's number from 0 in VOC.
        image_ids: (N).
        files: (N) paths of the images.
        sizes: (N, 2) float, width and height in pixels as recorded; NaN where they are not.
        records: (M) what an object is called in messages: "annotation 17".
        image_of, category_of: (M) int, index of the object's image and of its category among
            `categories`; -1 where the file has no such.
        boxes: (M, 4) float, [x, y, width, height] in pixels; NaN where they are not four numbers.
        crowd: (M) bool, COCO's iscrowd.
        difficult: (M) bool, VOC's difficult.
        segmentations: (M) polygons, run-length dicts, or None; as they stand in the file.
        verified: by image index, the categories that the image was searched for (LVIS); without an
            entry: all of them.
        problems: what reading found.
    """

    name: str
    kind: str
    source: str
    categories: dict[Hashable, str]
    image_ids: list[Hashable]
    files: list[str]
    sizes: np.ndarray
    records: list[str]
    image_of: np.ndarray
    category_of: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    segmentations: list[Any]
    verified: dict[int, frozenset] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def file_of(self, index: int) -> str:
        """The image file of the object `index`; "" where its image is unknown."""
        image = self.image_of[index]
        return self.files[image] if image >= 0 else ""

    def size_of(self, index: int) -> str:
        """The recorded size of the object's image, for messages: "640x480"."""
        width, height = self.sizes[self.image_of[index]]
        return f"{width:.0f}x{height:.0f}"

    def problem(self, kind: str, index: int, why: str) -> Problem:
        """The problem of the object `index`."""
        return Problem(kind, self.records[index], self.file_of(index), why)

    def objects_by_image(self) -> list[np.ndarray]:
        """For each image the indices of its objects, ascending."""
        order = np.argsort(self.image_of, kind="stable")
        bounds = np.searchsorted(self.image_of[order], np.arange(len(self.image_ids) + 1))
        return np.split(order, bounds)[1:-1]


def number_boxes(boxes: list[Any]) -> np.ndarray:
    """Boxes as they stand in a file -> (M, 4) float; NaN for what is not four finite numbers."""
    if all(type(box) is list and len(box) == 4 for box in boxes) and (
        set(map(type, chain.from_iterable(boxes))) <= {int, float}
    ):
        rows = boxes
    else:  # some are broken: one by one, so that only they are lost
        rows = [box if is_box(box) else [np.nan] * 4 for box in boxes]
    try:
        array = np.array(rows, float).reshape(-1, 4)
    except OverflowError:  # an integer that no float holds
        array = np.array([row if is_box(row) else [np.nan] * 4 for row in rows], float)
    array[~np.isfinite(array).all(axis=1)] = np.nan
    return array


def is_box(box: Any) -> bool:
    """Whether it is a list of four numbers."""
    return isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)


def is_number(value: Any) -> bool:
    """Whether JSON's value is a number; true and false are none, nor what overflows a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63
