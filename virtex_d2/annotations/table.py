"""The form that every annotation format is read into, and what can be wrong with a record."""

import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kind:
    """A kind of problem."""

    title: str  # what the records have, for people
    # whether it fails a data set's check; the others are for the reader to judge
    serious: bool = True


KINDS: dict[str, Kind] = {
    "unreadable": Kind("annotation file cannot be read"),
    "incomplete": Kind("field missing or of a wrong type"),
    "field-assumed": Kind("field missing that evaluators need", serious=False),
    "not-evaluable": Kind("field missing that LVIS's evaluation needs", serious=False),
    "id-repeated": Kind("id there twice"),
    "file-repeated": Kind("image file there twice"),
    "content-repeated": Kind("image there twice, under two file names"),
    "object-repeated": Kind("object there twice: same image, class and box"),
    "category-repeated": Kind("class name there twice"),
    "image-unknown": Kind("object of an unknown image"),
    "category-unknown": Kind("unknown class"),
    "class-left-out": Kind("object of a class that the config leaves out", serious=False),
    "verified-unknown": Kind("image searched for an unknown class"),
    "contradiction": Kind("class both annotated and declared absent"),
    "ignore-set": Kind("object with `ignore`, which detectron2 does not know"),
    "box-malformed": Kind("box that is not four finite numbers"),
    "box-empty": Kind("box of no width or height"),
    "box-outside": Kind("box outside its image"),
    "mask-missing": Kind("object without a mask"),
    "mask-malformed": Kind("mask that cannot be read"),
    "mask-empty": Kind("mask of no area"),
    "mask-outside": Kind("mask outside its image"),
    "mask-size": Kind("run-length mask of another size than its image"),
    "mask-box": Kind("mask and box in different places"),
    "image-missing": Kind("image file missing"),
    "image-damaged": Kind("image that cannot be decoded"),
    "image-size": Kind("image of another size than recorded"),
    "leak-file": Kind("evaluation image that is also a training image: same file"),
    "leak-content": Kind("evaluation image that is also a training image: same pixels"),
    "leak-name": Kind("evaluation image with a training image's file name", serious=False),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One record that is broken."""

    kind: str  # of `KINDS`
    record: str  # which, for people: "annotation 17", "image 5"
    image: str  # the file of its image; "" where the record belongs to none
    why: str  # what was found, and what was expected

    def __str__(self) -> str:
        image = f" ({os.path.basename(self.image)})" if self.image else ""
        return f"{self.record}{image}: {self.why}"


@dataclass(frozen=True)
class AnnotationTable:
    """A data set's annotations: N images, M objects, in the order of the file."""

    name: str  # of the data set, for people
    kind: str  # "coco", "lvis" or "voc"
    source: str  # the annotation file, or VOC's list of images
    categories: dict[Hashable, str]  # names by category id; by the class's number from 0 in VOC
    image_ids: list[Hashable]  # (N)
    files: list[str]  # (N) paths of the images
    # (N, 2) float, width and height in pixels as recorded; NaN where they are not
    sizes: np.ndarray
    records: list[str]  # (M) what an object is called in messages: "annotation 17"
    # image_of, category_of: (M) int, index of the object's image and of its category among
    # `categories`; -1 where the file has no such
    image_of: np.ndarray
    category_of: np.ndarray
    # (M) boxes in the file's numbers, None where they are not four finite ones: COCO's [x, y,
    # width, height]; VOC's corners, from 0 and the last ones excluded
    written: list[list[float] | None]
    crowd: np.ndarray  # (M) bool, COCO's iscrowd
    difficult: np.ndarray  # (M) bool, VOC's difficult
    segmentations: list[Any]  # (M) polygons, run-length dicts, or None; as they stand in the file
    # (M) COCO's lists of x, y and visibility, or None; empty where no object has any
    keypoints: list[list[float] | None] = field(default_factory=list)
    # by image index, the categories that the image was searched for (LVIS); without an entry: all
    # of them
    verified: dict[int, frozenset] = field(default_factory=dict)
    # VOC's classes that are none of `categories`, with the number of their objects
    unlisted: dict[str, int] = field(default_factory=dict)
    # fields that evaluators need, with the indices of the objects that lack them
    assumed: dict[str, list[int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)  # what else reading found
    # whether there are annotations at all; files for a test server have none
    has_truth: bool = True
    # (M, 4) float, [x, y, width, height] in pixels; NaN for None
    boxes: np.ndarray = field(init=False)

    def __post_init__(self):
        unknown = [np.nan] * 4
        boxes = np.array([box or unknown for box in self.written], float).reshape(-1, 4)
        if self.kind == "voc":
            boxes[:, 2:] -= boxes[:, :2]
        object.__setattr__(self, "boxes", boxes)

    def file_of(self, index: int) -> str:
        """The image file of the object `index`; "" where its image is unknown."""
        image = self.image_of[index]
        return self.files[image] if image >= 0 else ""

    def size_of(self, index: int) -> str:
        """The recorded size of the object's image, for messages: "640x480"."""
        width, height = self.sizes[self.image_of[index]]
        return f"{width:.0f}x{height:.0f}"

    def box_of(self, index: int) -> str:
        """The object's box as its file has it, for messages."""
        if self.kind != "voc":
            return f"bbox [{', '.join(f'{value:g}' for value in self.written[index])}]"
        x0, y0, x1, y1 = self.written[index]
        return f"xmin {x0 + 1:g}, ymin {y0 + 1:g}, xmax {x1:g}, ymax {y1:g}"

    def problem(self, kind: str, index: int, why: str) -> Problem:
        """The problem of the object `index`."""
        return Problem(kind, self.records[index], self.file_of(index), why)

    def image_problem(self, kind: str, index: int, why: str) -> Problem:
        """The problem of the image `index`."""
        return Problem(kind, f"image {self.image_ids[index]}", self.files[index], why)

    def overhang(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """By how many pixels the objects' extents reach outside their images.

        Args:
            low, high: (M, 2) corners of the extents, [x, y].

        Returns:
            (M), negative inside; -inf where a corner or the image's size is unknown.
        """
        sizes = np.vstack([self.sizes, [[np.nan, np.nan]]])[self.image_of]  # -1: the row of NaN
        over = np.maximum(-low, high - sizes).max(axis=1, initial=-np.inf)
        return np.where(np.isnan(over), -np.inf, over)

    def objects_by_image(self) -> list[np.ndarray]:
        """For each image the indices of its objects, ascending."""
        order = np.argsort(self.image_of, kind="stable")
        bounds = np.searchsorted(self.image_of[order], np.arange(len(self.image_ids) + 1))
        return np.split(order, bounds)[1:-1]


def is_box(box: Any) -> bool:
    """Whether it is a list of four numbers."""
    return isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)


def is_number(value: Any) -> bool:
    """Whether JSON's value is a number; true and false are none, nor what overflows a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63
