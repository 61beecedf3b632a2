"""Fills in what pycocotools and lvis take for granted in annotations."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pycocotools.mask as mask_utils


@contextlib.contextmanager
def handed_over(owner: Any, name: str, reader: Callable) -> Iterator[None]:
    """Let detectron2's evaluators read a file by `reader` while they are built.

    They name the class that opens the file themselves, and it takes values as they stand there.

    Args:
        owner: the module or class whose attribute `name` reads.
        name: of that attribute.
        reader: what stands in for it.
    """
    original = getattr(owner, name)
    setattr(owner, name, reader)
    try:
        yield
    finally:
        setattr(owner, name, original)


def complete(annotations: list[dict[str, Any]], to_rle: Callable[[dict], Any]) -> None:
    """Complete a file's annotations for an evaluation, in place.

    Ids are counted from 1: both packages take a match with the id 0 for none. Without `iscrowd` an
    object is no crowd. Without `area` (pixels) it is the mask's, or without one the box's.

    Args:
        annotations: of the file.
        to_rle: an annotation with a segmentation -> its compressed run-length mask.
    """
    for number, item in enumerate(annotations, start=1):
        item["id"] = number
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            has_mask = bool(item.get("segmentation"))
            _, _, width, height = item["bbox"]
            item["area"] = float(mask_utils.area(to_rle(item))) if has_mask else width * height
