"""Which evaluator for which data set."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from virtex_d2.detection.evaluation.coco import CocoEvaluator
from virtex_d2.detection.evaluation.voc import VocEvaluator
from virtex_d2.engine.errors import InputError, nearest


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator of a data set's type (`evaluator_type` in its metadata).

    Predictions and per_class.csv are stored in OUTPUT_DIR/<folder>, with several test sets in a
    folder of each.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise InputError(
            f"DATASETS.TEST: '{dataset_name}' has evaluator_type {kind!r}; expected one of "
            f"{', '.join(EVALUATORS)}.{nearest(str(kind), EVALUATORS)} Set it in its metadata."
        )
    folder = os.path.join(cfg.OUTPUT_DIR, folder)
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    return EVALUATORS[kind](dataset_name, tasks, folder)


def _lvis_evaluator(dataset_name: str, tasks: tuple[str, ...], folder: str) -> DatasetEvaluator:
    from virtex_d2.detection.evaluation.lvis import (
        LvisEvaluator,  # lvis draws, too, and imports matplotlib: half a second
    )

    return LvisEvaluator(dataset_name, tasks, folder)


# evaluator_type -> (data set's name, tasks, folder for predictions) -> evaluator.
EVALUATORS = {"coco": CocoEvaluator, "lvis": _lvis_evaluator, "pascal_voc": VocEvaluator}
