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
from virtex_d2.runtime.errors import InputError


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a data set's type; results go to OUTPUT_DIR/inference.

    Raises:
        InputError: the data set says no type, or one that no evaluator is known for.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind == "coco":
        return COCOEvaluator(
            dataset_name,
            tasks=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
            output_dir=folder,
            use_fast_impl=has_compiled_ops(),
        )
    if kind == "lvis":
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        return LVISEvaluator(dataset_name, tasks=tasks, output_dir=folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise InputError(
        f"DATASETS.TEST: '{dataset_name}' has evaluator_type {kind!r}; expected coco, lvis or "
        "pascal_voc. Set it in the data set's metadata."
    )
