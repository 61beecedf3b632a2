"""Predictions of a detector, in the form of results files."""

from collections.abc import Collection, Hashable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tqdm import tqdm

from virtex_d2.checkpoint.source import Source, local_path
from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError


@torch.no_grad()
def predict(
    cfg: CfgNode, dataset_name: str, weights: str, only: Collection[Hashable] | None = None
) -> list[dict[str, Any]]:
    """Run a detector on a data set.

    Args:
        cfg: with the preprocessing of the weights, MODEL.DEVICE and norms resolved.
        dataset_name: registered.
        weights: of the whole detector.
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
