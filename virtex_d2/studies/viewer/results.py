"""Predictions from the files that detectron2's evaluators write."""

import json
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.table import AnnotationTable, is_box, is_number
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_text
from virtex_d2.studies.viewer.instances import Instance

_NAMED = 5  # records or ids that an error names
_EXPECTED = (
    "expected ..._instances_results.json, which detectron2's evaluators write into the folder "
    "`inference` of a run"
)
_BEYOND = 1.0  # pixels: detectors cut boxes off at the image's edge, and files round


def read_results(path: str, table: AnnotationTable, threshold: float) -> list[list[Instance]]:
    """Read coco_instances_results.json, lvis_instances_results.json or VOC's in the same form.

    Args:
        path: a JSON list of {"image_id", "category_id", "bbox" [x, y, width, height], "score"} and,
            with masks, "segmentation".
        table: the data set that was predicted on.
        threshold: predictions below this score are left out, after they were checked.

    Returns:
        For each image of the table its predictions; an empty list where it has none.
    """
    if path.endswith((".pth", ".pkl")) and os.path.isfile(path):
        raise InputError(f"{path}: is a binary file; {_EXPECTED}.")
    try:
        content = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # JSON lines
            raise InputError(
                f"{path}: holds several JSON values, as metrics.json does; {_EXPECTED}."
            ) from error
        raise InputError(
            f"{path}: expected JSON, but it is cut short or not JSON: {error}"
        ) from error
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(
            f"{path}: expected a list of predictions, found {_known_as(content)}; {_EXPECTED}."
        )
    return collect(content, table, threshold, path)


def collect(
    records: Sequence[dict[str, Any]], table: AnnotationTable, threshold: float, source: str
) -> list[list[Instance]]:
    """The predictions of each image, from records as `read_results` takes them; `source` names
    them in errors.
    """
    for number, record in enumerate(records):
        if fault := _fault(record):
            raise InputError(f"{source}: record {number} {fault}. Predict again.")
    position = {key: index for index, key in enumerate(table.image_ids)}
    _refuse_unknown([r["image_id"] for r in records], position, "image", "images", table, source)
    classes = [record["category_id"] for record in records]
    _refuse_unknown(classes, table.categories, "category", "classes", table, source)
    found: list[list[Instance]] = [[] for _ in table.image_ids]
    for number, record in enumerate(records):
        image, mask = position[record["image_id"]], record.get("segmentation")
        # Those below the threshold, too: results of other images may all be there, and the ids of
        # two data sets overlap.
        if fault := _misplaced(record, table.sizes[image]):
            raise InputError(
                f"{source}: record {number}, of image {record['image_id']}: {fault}. Are these "
                "predictions of the same images?"
            )
        if record["score"] < threshold:
            continue
        x, y, box_width, box_height = record["bbox"]
        box = (x, y, x + box_width, y + box_height)
        found[image].append(Instance(record["category_id"], box, mask or None, record["score"]))
    return found


def _known_as(content: Any) -> str:
    if isinstance(content, dict) and {"images", "annotations"} & content.keys():
        return "an annotation file, which is the truth"
    return f"a {type(content).__name__}" + (" of other things" if type(content) is list else "")


def _misplaced(record: dict[str, Any], size: np.ndarray) -> str:
    """Why a prediction is of no image of this (width, height); "" where it may be."""
    if np.isnan(size).any():
        return ""
    width, height = (int(side) for side in size)
    x, y, box_width, box_height = record["bbox"]
    beyond = max(-x, -y, x + box_width - width, y + box_height - height)
    if beyond > _BEYOND:
        return f"its bbox {record['bbox']} reaches beyond the image of {width}x{height}"
    mask = record.get("segmentation")
    fault = mask_fault(mask, (height, width)) if mask else ""
    return f"its mask cannot be used: {fault}" if fault else ""


def _fault(record: dict[str, Any]) -> str:
    keys = ("image_id", "category_id", "bbox", "score")
    if missing := [key for key in keys if key not in record]:
        return f"lacks {', '.join(missing)}"
    for key in keys[:2]:
        if not isinstance(record[key], (int, str)):
            return f"has the {key} {record[key]!r}, no number and no text"
    score, box = record["score"], record["bbox"]
    if not is_number(score) or not math.isfinite(score):
        return f"has the score {score!r}, expected a number: did the training diverge?"
    if not is_box(box) or not all(map(math.isfinite, box)):
        return f"has the bbox {box!r}, expected four finite numbers"
    return ""


def _refuse_unknown(
    ids: Sequence[Hashable],
    known: Any,
    one: str,
    many: str,
    table: AnnotationTable,
    source: str,
) -> None:
    unknown = {key: None for key in ids if key not in known}
    if unknown:
        named = ", ".join(map(repr, list(unknown)[:_NAMED]))
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise InputError(
            f"{source}: predictions for {len(unknown)} {many} that {table.source} lacks: {one} id "
            f"{named}{more}. They are of another data set: name the one that was predicted on."
        )
