"""Predictions against the truth of one image, as COCO's evaluation matches them."""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.studies.viewer.instances import Instance, to_rle

IOU = 0.5  # from which a prediction of the right class counts as right, as in AP50


@dataclass(frozen=True)
class Match:
    """What came of one image.

    Attributes:
        truth: its objects: found, missed or ignored.
        predictions: right, wrong or ignored; of descending score.
    """

    truth: tuple[Instance, ...]
    predictions: tuple[Instance, ...]

    def count(self, verdict: str) -> int:
        """How many objects or predictions have a verdict."""
        return sum(item.verdict == verdict for item in (*self.truth, *self.predictions))


def match(
    truth: Sequence[Instance],
    predictions: Sequence[Instance],
    size: tuple[int, int],
    *,
    threshold: float = IOU,
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
        threshold: IoU, 0 to 1.
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
    return Match(
        tuple(
            replace(
                item,
                verdict="ignored" if item.ignore else "found" if index in taken else "missed",
            )
            for index, item in enumerate(truth)
        ),
        tuple(judged),
    )


def _overlaps(
    predictions: Sequence[Instance], truth: Sequence[Instance], size: tuple[int, int], by: str
) -> np.ndarray:
    """(P, T) IoU."""
    if not predictions or not truth:
        return np.zeros((len(predictions), len(truth)))
    crowd = [item.crowd for item in truth]
    forms = [
        [
            to_rle(item.segmentation, *size)
            if by == "segm"
            else [item.box[0], item.box[1], item.box[2] - item.box[0], item.box[3] - item.box[1]]
            for item in items
        ]
        for items in (predictions, truth)
    ]
    return np.asarray(coco_mask.iou(*forms, crowd))
