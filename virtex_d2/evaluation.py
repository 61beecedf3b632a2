"""Which evaluator for which data set."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from virtex_d2.runtime.compat import has_compiled_ops
from virtex_d2.runtime.errors import InputError, nearest


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator of a data set's type (`evaluator_type` in its metadata).

    Predictions are stored in OUTPUT_DIR/<folder>, with several test sets in a folder of each.

    Raises:
        InputError: the data set says no type, or one that no evaluator is known for.
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
    return EVALUATORS[kind](cfg, dataset_name, folder)


def _tasks(cfg: CfgNode) -> tuple[str, ...]:
    return ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)


def _coco(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    # The fast implementation is compiled; the official one gives the same AP.
    return COCOEvaluator(
        dataset_name, _tasks(cfg), output_dir=folder, use_fast_impl=has_compiled_ops()
    )


def _lvis(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return LVISEvaluator(dataset_name, _tasks(cfg), output_dir=folder)


def _pascal_voc(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    del cfg, folder  # it writes to a temporary folder of its own
    return PascalVOCDetectionEvaluator(dataset_name)


# evaluator_type -> (config, data set's name, folder for predictions) -> evaluator.
EVALUATORS = {"coco": _coco, "lvis": _lvis, "pascal_voc": _pascal_voc}
