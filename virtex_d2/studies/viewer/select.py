"""Every image judged, and which of them are shown."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.studies.viewer.instances import Instance
from virtex_d2.studies.viewer.matching import Match, match
from virtex_d2.studies.viewer.truth import objects


@dataclass(frozen=True)
class Judged:
    """One image with its objects and the predictions of each detector.

    Attributes:
        index: in the table.
        truth: its objects.
        matches: by detector.
    """

    index: int
    truth: tuple[Instance, ...]
    matches: Mapping[str, Match]

    def count(self, verdict: str) -> int:
        """How many have a verdict, over all detectors."""
        return sum(each.count(verdict) for each in self.matches.values())


# What comes first: order -> key, descending; equal ones stay in the data set's order.
ORDERS: dict[str, Callable[[Judged], float]] = {
    "errors": lambda image: image.count("missed") + image.count("wrong"),
    "missed": lambda image: image.count("missed"),
    "wrong": lambda image: image.count("wrong"),
    "right": lambda image: image.count("right"),
    "file": lambda image: 0,
}


def judge(
    table: AnnotationTable,
    predictions: Mapping[str, Sequence[Sequence[Instance]]],
    *,
    threshold: float = 0.5,
    by: str = "bbox",
    classes: Collection[Hashable] | None = None,
    images: Collection[int] | None = None,
) -> list[Judged]:
    """Match the predictions of all images.

    Args:
        table: the data set.
        predictions: of each detector, for each image.
        threshold: IoU from which a prediction is right.
        by: "bbox" or "segm".
        classes: category ids; objects and predictions of others are left out, and images without
            any. None: all.
        images: indices of the images; None: all.
    """
    judged = []
    rows = table.objects_by_image()
    for index in range(len(table.image_ids)) if images is None else sorted(images):
        if np.isnan(table.sizes[index]).any():
            raise InputError(
                f"{table.source}: image {table.image_ids[index]} has no width and height. "
                "tools/check_dataset.py names all that is wrong with the file."
            )
        width, height = (int(side) for side in table.sizes[index])
        truth = _of(classes, objects(table, rows[index], (height, width)))
        found = {name: _of(classes, each[index]) for name, each in predictions.items()}
        if classes is not None and not truth and not any(found.values()):
            continue
        if by == "segm":
            _require_masks(table, index, [*truth, *(item for e in found.values() for item in e)])
        matches = {
            name: match(
                truth,
                each,
                (height, width),
                threshold=threshold,
                by=by,
                verified=table.verified.get(index),
            )
            for name, each in found.items()
        }
        judged.append(Judged(index, tuple(truth), matches))
    return judged


def arrange(judged: Sequence[Judged], order: str, seed: int = 0) -> list[Judged]:
    """The images in one of ORDERS, or "random"."""
    if order == "random":
        return random.Random(seed).sample(list(judged), len(judged))
    if order not in ORDERS:
        known = [*ORDERS, "random"]
        raise InputError(
            f"--sort {order}: expected one of {', '.join(known)}.{nearest(order, known)}"
        )
    return sorted(judged, key=lambda image: -ORDERS[order](image))


def count_classes(judged: Sequence[Judged], name: str) -> dict[Hashable, Counter]:
    """By category id how many objects and predictions of a detector have each verdict."""
    counts: dict[Hashable, Counter] = {}
    for image in judged:
        result = image.matches[name]
        for item in (*result.truth, *result.predictions):
            counts.setdefault(item.category, Counter())[item.verdict] += 1
    return counts


def class_ids(table: AnnotationTable, names: Sequence[str]) -> set[Hashable] | None:
    """Category ids of class names; None for no name at all."""
    if not names:
        return None
    ids = {name: key for key, name in table.categories.items()}
    for name in names:
        if name not in ids:
            raise InputError(
                f"--classes {name}: {table.source} has no such class.{nearest(name, ids)}"
            )
    return {ids[name] for name in names}


def masks_everywhere(
    table: AnnotationTable, predictions: Mapping[str, Sequence[Sequence[Instance]]]
) -> bool:
    """Whether there are masks to match by: of some object, and of each that is predicted."""
    predicted = (item for each in predictions.values() for items in each for item in items)
    return (
        bool(table.segmentations)
        and all(table.segmentations)
        and all(item.segmentation is not None for item in predicted)
    )


def _of(classes: Collection[Hashable] | None, items: Sequence[Instance]) -> list[Instance]:
    return [item for item in items if classes is None or item.category in classes]


def _require_masks(table: AnnotationTable, index: int, items: Sequence[Instance]) -> None:
    if lacking := sum(item.segmentation is None for item in items):
        raise InputError(
            f"{table.source}: {lacking} of {len(items)} objects and predictions of image "
            f"{table.image_ids[index]} have no mask that can be read; match them with --by bbox."
        )
