"""LVIS's AP (arXiv 1908.03195), for any file of its format, with a table of the classes."""

import itertools
import json
import logging
import math
import os
from collections import Counter

from detectron2.evaluation import LVISEvaluator
from detectron2.utils.logger import create_small_table
from lvis import LVIS, LVISEval, LVISResults

from virtex_d2.annotations.records import read_sound
from virtex_d2.detection.evaluation.ground_truth import complete, handed_over
from virtex_d2.detection.evaluation.per_class import (
    ClassResult,
    class_aps,
    log_without_objects,
    log_without_truth,
    write_per_class,
)
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.signals import interruptible

logger = logging.getLogger(__name__)

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
# What each task's AP looks at. With its box a mask would count as large as the box.
_FIELDS = {"bbox": "bbox", "segm": "segmentation"}


class LvisEvaluator(LVISEvaluator):
    """detectron2's, with the classes of the file instead of those of a version.

    Reports AP, AP50, AP75, by size (APs, APm, APl) and by the frequency of the class in the
    training images (APr, APc, APf): NaN where there is nothing to detect, 0 where nothing is
    detected. Writes per_class.csv.

    Args:
        dataset_name: registered, with `json_file` in its metadata.
        tasks: of "bbox" and "segm".
        output_dir: for predictions and the table.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str):
        with handed_over(LVIS, "_load_json", _read):
            super().__init__(dataset_name, tasks, output_dir=output_dir)
        annotations = self._lvis_api.dataset["annotations"]
        complete(annotations, self._lvis_api.ann_to_rle)
        for item in annotations:
            item["ignore"] = int(item["iscrowd"])  # LVIS has no crowds; a file of its format may
        self._lvis_api._create_index()
        self._dataset_name = dataset_name

    @interruptible()
    def _eval_predictions(self, predictions: list[dict]) -> None:
        numbers = sorted(self._lvis_api.get_cat_ids())
        detections = list(itertools.chain(*(item["instances"] for item in predictions)))
        for detection in detections:
            detection["category_id"] = numbers[detection["category_id"]]
        with atomic_path(os.path.join(self._output_dir, "lvis_instances_results.json")) as file:
            file.write_text(json.dumps(detections))
        if not self._do_evaluation:
            log_without_truth(self._dataset_name, self._output_dir)
            return
        results: list[ClassResult] = []
        for task in self._tasks:
            evaluation = LVISEval(self._lvis_api, self._loaded(detections, task), task)
            evaluation.run()
            self._results[task] = {
                metric: 100 * value
                if (value := float(evaluation.results[metric])) > -1
                else math.nan
                for metric in _METRICS
            }
            table = create_small_table(self._results[task])
            logger.info("Evaluation results for %s:\n%s", task, table)
            results += self._of_classes(evaluation, task)
        log_without_objects(results, self._dataset_name)
        write_per_class(self._output_dir, results)

    def _loaded(self, detections: list[dict], task: str) -> LVISResults:
        if not detections:
            return _NoResults(self._lvis_api)
        fields = ("image_id", "category_id", "score", _FIELDS[task])
        return LVISResults(self._lvis_api, [{key: d[key] for key in fields} for d in detections])

    def _of_classes(self, evaluation: LVISEval, task: str) -> list[ClassResult]:
        counts = Counter(
            item["category_id"]
            for item in self._lvis_api.dataset["annotations"]
            if not item["ignore"]
        )
        aps = class_aps(evaluation.eval["precision"][:, :, :, 0])  # area range "all"
        return [
            ClassResult(
                task,
                category["name"],
                counts[number],
                {metric: float(values[place]) for metric, values in aps.items()},
                {"frequency": category["frequency"]},
            )
            for place, number in enumerate(evaluation.params.cat_ids)
            if (category := self._lvis_api.cats[number])
        ]


def _read(api: LVIS, path: str) -> dict:
    return {"annotations": [], **read_sound("lvis", path)}


class _NoResults(LVISResults):
    """No detection at all, which `LVISResults` does not load."""

    def __init__(self, ground_truth: LVIS):
        self.logger = logger
        self.dataset = {**ground_truth.dataset, "annotations": []}
        self._create_index()
