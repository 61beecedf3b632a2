"""Predicted masks on held-out images, judged against the truth."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from virtex_d2.engine.files import read_json
from virtex_d2.studies.viewer.drawing import read_pixels
from virtex_d2.studies.viewer.matching import to_mask, to_rle

RIGHT_IOU = 0.5  # mask IoU from which a prediction of the right class counts as right, as in AP50


@dataclass(frozen=True)
class Instance:
    """One object, true or predicted.

    Attributes:
        name: its class.
        mask: (H, W) bool.
        score: 0 to 1; None for a true one.
        right: of a prediction, whether it matches a true object; of a true one, whether it is one.
    """

    name: str
    mask: np.ndarray
    score: float | None = None
    right: bool = True


@dataclass(frozen=True)
class Picture:
    """One held-out image: (H, W, 3) uint8 RGB, its objects, and each start's predictions."""

    file_name: str
    image: np.ndarray
    truth: tuple[Instance, ...]
    predictions: Mapping[str, tuple[Instance, ...]]


def load_pictures(
    annotations: Path, images: Path, predictions: Mapping[str, Path], count: int
) -> list[Picture]:
    """The first `count` images with an object, in the annotation file's order: none is chosen.

    Of each start, as many predictions are taken as the image has objects, those of highest score:
    no threshold is tuned.

    Args:
        annotations: COCO instances.
        images: their folder.
        predictions: COCO-format results by start.
        count: how many.
    """
    coco = read_json(annotations)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    truth = _by_image(coco["annotations"])
    results = {start: _by_image(read_json(path, list)) for start, path in predictions.items()}
    pictures = []
    for record in coco["images"]:
        objects = truth.get(record["id"], [])
        if not objects:
            continue
        pictures.append(
            Picture(
                record["file_name"],
                read_pixels(images / record["file_name"]),
                tuple(
                    Instance(names[item["category_id"]], _mask(item, record)) for item in objects
                ),
                {
                    start: judge(by_image.get(record["id"], []), objects, record, names)
                    for start, by_image in results.items()
                },
            )
        )
        if len(pictures) == count:
            break
    return pictures


def judge(
    predicted: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    record: Mapping[str, Any],
    names: Mapping[int, str],
) -> tuple[Instance, ...]:
    """The best-scored predictions of one image, matched to its objects one to one.

    In the order of their scores, each takes the free object of its class that it overlaps most; it
    is right where that mask IoU is at least `RIGHT_IOU`.

    Args:
        predicted: COCO results of this image, with "segmentation" in RLE.
        objects: its COCO annotations.
        record: its image record ("height", "width" in pixels).
        names: class names by category id.
    """
    best = sorted(predicted, key=lambda item: -item["score"])[: len(objects)]
    if not best:
        return ()
    true_masks = [_rle(item, record) for item in objects]
    overlaps = coco_mask.iou([_rle(item, record) for item in best], true_masks, [0] * len(objects))
    free = set(range(len(objects)))
    instances = []
    for item, ious in zip(best, overlaps):
        same = [i for i in free if objects[i]["category_id"] == item["category_id"]]
        match = max(same, key=lambda i: ious[i], default=None)
        right = match is not None and ious[match] >= RIGHT_IOU
        if right:
            free.discard(match)
        instances.append(
            Instance(
                names.get(item["category_id"], f"category {item['category_id']}"),
                _mask(item, record),
                item["score"],
                right,
            )
        )
    return tuple(instances)


def _rle(item: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return to_rle(item["segmentation"], record["height"], record["width"])


def _mask(item: Mapping[str, Any], record: Mapping[str, Any]) -> np.ndarray:
    return to_mask(item["segmentation"], record["height"], record["width"])


def _by_image(items: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for item in items:
        grouped.setdefault(item["image_id"], []).append(item)
    return grouped
