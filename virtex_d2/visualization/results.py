"""Predictions from the files that detectron2's evaluators write."""

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from virtex_d2.data.annotations.masks import mask_fault
from virtex_d2.data.annotations.table import AnnotationTable, is_box, is_number
from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_text

from .instances import Instance

_NAMED = 5  # records or ids that an error names


def read_results(path: str, table: AnnotationTable, threshold: float) -> list[list[Instance]]:
    """Read coco_instances_results.json, lvis_instances_results.json or VOC's in the same form.

    Args:
        path: a JSON list of {"image_id", "category_id", "bbox" [x, y, width, height], "score"} and,
            with masks, "segmentation".
        table: the data set that was predicted on.
        threshold: predictions below this score are left out.

    Returns:
        For each image of the table its predictions; an empty list where it has none.

    Raises:
        InputError: it cannot be read, is of another data set, or a record is broken.
    """
    try:
        content = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected JSON, but it is cut short or not JSON: {error}"
        ) from error
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(
            f"{path}: expected a list of predictions, as detectron2's evaluators write it into "
            f"..._instances_results.json; found a {type(content).__name__}. Is it the annotation "
            "file?"
        )
    return collect(content, table, threshold, path)


def collect(
    records: Sequence[dict[str, Any]], table: AnnotationTable, threshold: float, source: str
) -> list[list[Instance]]:
    """The predictions of each image, from records as `read_results` takes them; `source` names
    them in errors.

    Raises:
        InputError: as `read_results`.
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
        if record["score"] < threshold:
            continue
        image, mask = position[record["image_id"]], record.get("segmentation")
        width, height = table.sizes[image]
        sized = mask and not np.isnan(width)
        if sized and (fault := mask_fault(mask, (int(height), int(width)))):
            raise InputError(
                f"{source}: record {number}, of image {record['image_id']}: its mask cannot be "
                f"used: {fault}. Are these predictions of the same images?"
            )
        x, y, box_width, box_height = record["bbox"]
        box = (x, y, x + box_width, y + box_height)
        found[image].append(Instance(record["category_id"], box, mask or None, record["score"]))
    return found


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
