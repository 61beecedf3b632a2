"""Objects of an image, and predictions matched to them as COCO's evaluation does."""

import random
from collections import Counter
from collections.abc import Collection, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.engine.errors import InputError


@dataclass(frozen=True)
class Instance:
    """One object, true or predicted."""

    category: Hashable  # its category id
    box: tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels of the image
    segmentation: Any = None  # its mask in COCO's forms (polygons, run lengths); None: no mask
    score: float | None = None  # 0 to 1 of a prediction; None of a true object
    # of a true object, whether it counts neither as missed nor for a prediction: COCO's crowds,
    # VOC's difficult ones
    ignore: bool = False
    crowd: bool = False  # whether it is a region of many objects
    # what became of it in matching: a true object is found, missed or ignored; a prediction is
    # right, wrong or ignored. "broken" is an annotation that fails its data set's check; "" is
    # before all that
    verdict: str = ""


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Compress a COCO segmentation: polygons, RLE, or RLE with plain counts."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Paint a COCO segmentation as (height, width) bool."""
    return coco_mask.decode(to_rle(segmentation, height, width)) > 0


def objects(
    table: AnnotationTable,
    rows: Iterable[int],
    size: tuple[int, int],
    broken: Container[str] = (),
) -> list[Instance]:
    """Take the objects of one image; without those that have no box, and masks that cannot be read.

    Objects of no class of the data set are left out, too, unless they are marked as broken.

    Args:
        size: (height, width) of the image in pixels.
        broken: names of the records to mark as broken.
    """
    categories = list(table.categories)
    found = []
    for row in rows:
        x, y, width, height = table.boxes[row].tolist()
        mask, category = table.segmentations[row], table.category_of[row]
        is_broken = table.records[row] in broken
        if np.isnan(x) or (category < 0 and not is_broken):
            continue
        found.append(
            Instance(
                category=categories[category] if category >= 0 else "unknown",
                box=(x, y, x + width, y + height),
                segmentation=mask if mask and not mask_fault(mask, size) else None,
                ignore=bool(table.crowd[row] or table.difficult[row]),
                crowd=bool(table.crowd[row]),
                verdict="broken" if is_broken else "",
            )
        )
    return found


@dataclass(frozen=True)
class Match:
    """What came of one image."""

    truth: tuple[Instance, ...]  # its objects: found, missed or ignored
    predictions: tuple[Instance, ...]  # right, wrong or ignored; of descending score

    def count(self, *verdicts: str) -> int:
        """Count the objects and predictions that have one of these verdicts."""
        return sum(item.verdict in verdicts for item in (*self.truth, *self.predictions))


def match(
    truth: Sequence[Instance],
    predictions: Sequence[Instance],
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    by: str = "bbox",
    verified: Collection[Hashable] | None = None,
) -> Match:
    """Match predictions to objects one to one, within their class.

    COCO's rule (pycocotools, COCOeval.evaluateImg): in the order of their scores, each prediction
    takes the free object that it overlaps most, from the threshold on. One that overlaps only an
    ignored object, is ignored itself; a crowd may take any number, and overlap with it is the
    share of the prediction that lies in it.

    Args:
        truth: the objects.
        predictions: in any order. Leave out those below a score first.
        size: (height, width) of the image in pixels.
        threshold: IoU, 0 to 1; 0.5 as in AP50.
        by: "bbox", or "segm" for masks; objects and predictions must all have them then.
        verified: the categories for which the image was searched completely (LVIS); unmatched
            predictions of others are ignored. None: all.
    """
    ranked = sorted(predictions, key=lambda item: -item.score)
    # ignored ones last, so that none takes a prediction from an object that counts
    order = sorted(range(len(truth)), key=lambda index: truth[index].ignore)
    overlaps = _overlaps(ranked, [truth[index] for index in order], size, by)
    taken: set[int] = set()
    judged = []
    for item, row in zip(ranked, overlaps):
        best, best_overlap = None, min(threshold, 1 - 1e-10)
        for index, overlap in zip(order, row):
            candidate = truth[index]
            if candidate.category != item.category or (index in taken and not candidate.crowd):
                continue
            if best is not None and candidate.ignore and not truth[best].ignore:
                break
            if overlap >= best_overlap:
                best, best_overlap = index, overlap
        if best is not None:
            taken.add(best)
            verdict = "ignored" if truth[best].ignore else "right"
        else:
            unverified = verified is not None and item.category not in verified
            verdict = "ignored" if unverified else "wrong"
        judged.append(replace(item, verdict=verdict))
    verdicts = [
        "ignored" if item.ignore else "found" if index in taken else "missed"
        for index, item in enumerate(truth)
    ]
    objects = (replace(item, verdict=verdict) for item, verdict in zip(truth, verdicts))
    return Match(tuple(objects), tuple(judged))


def _overlaps(
    predictions: Sequence[Instance], truth: Sequence[Instance], size: tuple[int, int], by: str
) -> np.ndarray:
    """(P, T) IoU."""
    if not predictions or not truth:
        return np.zeros((len(predictions), len(truth)))

    def form(item: Instance) -> Any:
        if by == "segm":
            return to_rle(item.segmentation, *size)
        x0, y0, x1, y1 = item.box
        return [x0, y0, x1 - x0, y1 - y0]

    crowd = [item.crowd for item in truth]
    found, wanted = map(form, predictions), map(form, truth)
    return np.asarray(coco_mask.iou(list(found), list(wanted), crowd))


@dataclass(frozen=True)
class Judged:
    """One image with its objects and the predictions of each detector."""

    index: int  # in the table
    truth: tuple[Instance, ...]  # its objects
    matches: Mapping[str, Match]  # by detector


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
        predictions: of each detector, for each image.
        threshold: IoU from which a prediction is right.
        classes: category ids; objects and predictions of others are left out, and images without
            any. None: all.
    """

    def wanted(items: Sequence[Instance]) -> list[Instance]:
        return [item for item in items if classes is None or item.category in classes]

    judged = []
    rows = table.objects_by_image()
    for index in range(len(table.image_ids)) if images is None else sorted(images):
        name = f"{table.source}: image {table.image_ids[index]}"
        if np.isnan(table.sizes[index]).any():
            raise InputError(
                f"{name} has no width and height. tools/check_dataset.py names all that is wrong "
                "with the file."
            )
        width, height = (int(side) for side in table.sizes[index])
        truth = wanted(objects(table, rows[index], (height, width)))
        found = {detector: wanted(each[index]) for detector, each in predictions.items()}
        every = [*truth, *(item for each in found.values() for item in each)]
        if classes is not None and not every:
            continue
        lacking = sum(item.segmentation is None for item in every)
        if by == "segm" and lacking:
            raise InputError(
                f"{name}: {lacking} of {len(every)} objects and predictions have no mask that can "
                "be read; match them with --by bbox."
            )
        options = {"threshold": threshold, "by": by, "verified": table.verified.get(index)}
        matches = {
            detector: match(truth, each, (height, width), **options)
            for detector, each in found.items()
        }
        judged.append(Judged(index, tuple(truth), matches))
    return judged


def masks_everywhere(
    table: AnnotationTable, predictions: Mapping[str, Sequence[Sequence[Instance]]]
) -> bool:
    """Say whether there are masks to match by: of some object, and of each that is predicted."""
    predicted = (item for each in predictions.values() for items in each for item in items)
    return (
        bool(table.segmentations)
        and all(table.segmentations)
        and all(item.segmentation is not None for item in predicted)
    )


def arrange(judged: Sequence[Judged], order: str, seed: int = 0) -> list[Judged]:
    """Sort images: those with most of the verdict `order` first ("errors": missed and wrong), in
    the order of the "file", or at "random". Equal ones stay in the file's order.
    """
    if order == "random":
        return random.Random(seed).sample(list(judged), len(judged))
    verdicts = {"errors": ("missed", "wrong"), "file": ()}.get(order, (order,))
    return sorted(
        judged,
        key=lambda image: -sum(result.count(*verdicts) for result in image.matches.values()),
    )


def count_classes(judged: Sequence[Judged], name: str) -> dict[Hashable, Counter]:
    """Count by category id the objects and predictions of a detector that have each verdict."""
    counts: dict[Hashable, Counter] = {}
    for image in judged:
        result = image.matches[name]
        for item in (*result.truth, *result.predictions):
            counts.setdefault(item.category, Counter())[item.verdict] += 1
    return counts
