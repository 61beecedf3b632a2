"""COCO's AP, with a table of the classes."""

import contextlib
import io
from collections import Counter
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from virtex_d2.annotations.records import read_sound
from virtex_d2.detection.evaluation.ground_truth import complete, handed_over
from virtex_d2.detection.evaluation.per_class import (
    ClassResult,
    class_aps,
    log_without_objects,
    log_without_truth,
    write_per_class,
)
from virtex_d2.engine.compat import has_compiled_ops
from virtex_d2.engine.signals import interruptible


class CocoEvaluator(COCOEvaluator):
    """detectron2's, for files that leave out what it needs, and for no predictions.

    Where nothing is detected, AP is 0; where there is nothing to detect (no object of a size, say),
    it is NaN. A class without an object is left out of the mean. Writes per_class.csv.

    Args:
        dataset_name: registered, with `json_file` in its metadata.
        tasks: of "bbox" and "segm".
        output_dir: for predictions and the table.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str):
        # The fast implementation is compiled; the official one gives the same AP.
        fast = has_compiled_ops()
        with handed_over(coco_evaluation, "COCO", _read):
            super().__init__(dataset_name, tasks, output_dir=output_dir, use_fast_impl=fast)
        if self._do_evaluation:
            complete(self._coco_api.dataset["annotations"], self._coco_api.annToRLE)
            _index(self._coco_api)
        self._dataset_name = dataset_name
        self._class_results: list[ClassResult] = []

    def evaluate(self, img_ids: list | None = None) -> dict[str, Any]:
        """Task -> metric -> percent; in the first process alone."""
        self._class_results = []
        results = super().evaluate(img_ids)
        if self._class_results:
            log_without_objects(self._class_results, self._dataset_name)
            write_per_class(self._output_dir, self._class_results)
        return results

    @interruptible()
    def _eval_predictions(self, *args: Any, **kwargs: Any) -> None:
        super()._eval_predictions(*args, **kwargs)
        if not self._do_evaluation:
            log_without_truth(self._dataset_name, self._output_dir)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._evaluate_nothing(iou_type)
        counts = Counter(
            item["category_id"]
            for item in self._coco_api.dataset["annotations"]
            if not item["iscrowd"]
        )
        # (IoU, recall, class, area range "all", most detections)
        aps = class_aps(np.asarray(coco_eval.eval["precision"])[:, :, :, 0, -1])
        for place, number in enumerate(coco_eval.params.catIds):
            self._class_results.append(
                ClassResult(
                    iou_type,
                    self._coco_api.cats[number]["name"],
                    counts[number],
                    {metric: float(values[place]) for metric, values in aps.items()},
                )
            )
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> COCOeval:
        """The evaluation of no detection at all, which pycocotools does not load."""
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        _index(nothing)
        kind = COCOeval_opt if self._use_fast_impl else COCOeval
        evaluation = kind(self._coco_api, nothing, iou_type)
        evaluation.params.maxDets = self._max_dets_per_image
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def _read(path: str) -> COCO:
    api = COCO()
    api.dataset = read_sound("coco", path)
    _index(api)
    return api


def _index(api: COCO) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
