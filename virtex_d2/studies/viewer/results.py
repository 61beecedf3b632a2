"""Predictions, from the files that detectron2's evaluators write or of a detector."""

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tqdm import tqdm

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.table import AnnotationTable, is_box, is_number
from virtex_d2.checkpoint.source import Source, local_path
from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.files import read_json
from virtex_d2.studies.viewer.matching import Instance

_NAMED = 5  # ids that an error names
_KEYS = ("image_id", "category_id", "bbox", "score")
_BEYOND = 1.0  # pixels: detectors cut boxes off at the image's edge, and files round


def read_results(path: str, table: AnnotationTable, threshold: float) -> list[list[Instance]]:
    """Read coco_instances_results.json, lvis_instances_results.json or VOC's in the same form.

    Args:
        path: a JSON list of {"image_id", "category_id", "bbox" [x, y, width, height], "score"} and,
            with masks, "segmentation".
        threshold: predictions below this score are left out, after they were checked.

    Returns:
        For each image of the table its predictions; an empty list where it has none.
    """
    try:
        records = read_json(path, list)
    except InputError as error:
        raise InputError(
            f"{error} Expected ..._instances_results.json, which detectron2's evaluators write "
            "into the folder `inference` of a run."
        ) from error
    return collect(records, table, threshold, path)


def collect(
    records: Sequence[dict[str, Any]], table: AnnotationTable, threshold: float, source: str
) -> list[list[Instance]]:
    """Sort records as `read_results` takes them to their images; `source` names them in errors."""
    for number, record in enumerate(records):
        if fault := _fault(record):
            raise InputError(f"{source}: record {number} {fault}. Predict again.")
    position = {key: index for index, key in enumerate(table.image_ids)}
    for key, known, many in (
        ("image_id", position, "images"),
        ("category_id", table.categories, "classes"),
    ):
        _refuse_unknown((record[key] for record in records), known, key, many, table, source)
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
        if record["score"] >= threshold:
            x, y, width, height = record["bbox"]
            box = (x, y, x + width, y + height)
            found[image].append(Instance(record["category_id"], box, mask or None, record["score"]))
    return found


@torch.no_grad()
def predict(
    cfg: CfgNode, dataset_name: str, weights: str, only: Collection[Hashable] | None = None
) -> list[dict[str, Any]]:
    """Run a detector on a data set.

    Args:
        cfg: with the preprocessing of the weights, MODEL.DEVICE and norms resolved.
        only: ids of the images; None: all.

    Returns:
        Records as COCOEvaluator writes them, with the data set's own category ids.
    """
    source = Source(local_path(weights))
    if not source.is_detector:
        raise InputError(
            f"--weights {weights}: expected a detector's checkpoint, such as OUTPUT_DIR/"
            "model_final.pth; a backbone alone detects nothing."
        )
    model = DetectionTrainer.build_model(cfg)
    checkpointer = DetectorCheckpointer(model, whole=True)
    checkpointer.opened = source.stored
    checkpointer.load(source.path, checkpointables=[])
    del source  # whose tensors are set
    model.eval()
    data = DatasetCatalog.get(dataset_name)
    # Known after loading: COCO's loader finds the ids in the file.
    ids = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id") or {}
    own = {number: key for key, number in ids.items()}
    wanted = [record for record in data if only is None or record["image_id"] in only]
    mapper, records = DatasetMapper(cfg, is_train=False), []
    for record in tqdm(wanted, desc=dataset_name, unit="image", leave=False):
        try:
            sample = mapper(record)
        except (OSError, SyntaxError, SizeMismatchError) as error:
            raise InputError(f"{record['file_name']}: unusable: {error}") from error
        instances = model([sample])[0]["instances"].to("cpu")
        for found in instances_to_coco_json(instances, record["image_id"]):
            number = found["category_id"]
            records.append({**found, "category_id": own.get(number, number)})
    return records


def _fault(record: Any) -> str:
    """What of a record is no prediction; "" where it is one."""
    if not isinstance(record, dict):
        return f"is {record!r:.50}, expected an object with {', '.join(_KEYS)}"
    if missing := [key for key in _KEYS if key not in record]:
        return f"lacks {', '.join(missing)}"
    for key in _KEYS[:2]:
        if not isinstance(record[key], (int, str)):
            return f"has the {key} {record[key]!r}, no number and no text"
    score, box = record["score"], record["bbox"]
    if not is_number(score) or not math.isfinite(score):
        return f"has the score {score!r}, expected a number: did the training diverge?"
    if not is_box(box) or not all(map(math.isfinite, box)):
        return f"has the bbox {box!r}, expected four finite numbers"
    return ""


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


def _refuse_unknown(
    ids: Iterable[Hashable],
    known: Collection[Hashable],
    key: str,
    many: str,
    table: AnnotationTable,
    source: str,
) -> None:
    unknown = list(dict.fromkeys(one for one in ids if one not in known))
    if unknown:
        raise InputError(
            f"{source}: predictions for {len(unknown)} {many} that {table.source} lacks: {key} "
            f"{some(map(repr, unknown), _NAMED)}. They are of another data set: name the one that "
            "was predicted on."
        )
