"""Pascal VOC's AP, by 11 points (2007) and by the area under the curve, with a table by class.

As the evaluation that comes with py-faster-rcnn and detectron2: the detections of a class go by
falling score to the object of their image that they overlap most. A second detection of an object
is wrong; one of a difficult object counts neither way.
"""

import itertools
import json
import logging
import os

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.annotations.voc import read_voc_folder
from virtex_d2.detection.evaluation.per_class import (
    ClassResult,
    log_without_objects,
    write_per_class,
)
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.signals import interruptible

logger = logging.getLogger(__name__)

_THRESHOLDS = np.arange(50, 100, 5) / 100  # of IoU
_STYLES = {"11point": True, "area": False}


class VocEvaluator(DatasetEvaluator):
    """AP, AP50 and AP75 of boxes, for any folder of VOC's layout.

    Plain "AP", "AP50" and "AP75" are by 11 points for VOC 2007 (`year` in the metadata) and by the
    area for all others; "AP50_11point", "AP50_area" and so on are both. AP is the mean over IoU
    thresholds of 0.5 to 0.95, as COCO's. A class without an object that is not difficult is left
    out of the means, which detectron2's evaluator counts as 0 or NaN. Writes per_class.csv.

    Args:
        dataset_name: registered, with `dirname`, `split`, `year` and `thing_classes` in its
            metadata.
        tasks: ("bbox",).
        output_dir: for predictions and the table.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str):
        if tasks != ("bbox",):
            raise ValueError(f"VOC's layout has boxes alone, not {tasks}")
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._classes = metadata.thing_classes
        self._truth = read_voc_folder(
            metadata.dirname, metadata.split, dataset_name, self._classes, chosen=True
        )
        self._style = "11point" if metadata.year == 2007 else "area"
        self._predictions: list[dict] = []

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the detections of a batch: {"image_id", ...} and {"instances": Instances} each."""
        for record, output in zip(inputs, outputs):
            instances = output["instances"].to(torch.device("cpu"))
            self._predictions += instances_to_coco_json(instances, record["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bbox": {metric: percent}}, NaN where no class has an object; in the first process.

        Writes voc_instances_results.json (COCO's format of results; `category_id` is the class's
        number from 0) and per_class.csv.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        return self._results_of(list(itertools.chain(*gathered)))

    @interruptible()
    def _results_of(self, detections: list[dict]) -> dict[str, dict[str, float]]:
        path = os.path.join(self._output_dir, "voc_instances_results.json")
        with atomic_path(path) as file:
            file.write_text(json.dumps(detections))
        results = [
            self._of_class(name, number, [d for d in detections if d["category_id"] == number])
            for number, name in enumerate(self._classes)
        ]
        log_without_objects(results, self._dataset_name)
        write_per_class(self._output_dir, results)
        counted = [result.metrics for result in results if result.num_gt]
        means = {
            metric: float(np.mean([metrics[metric] for metrics in counted])) if counted else np.nan
            for metric in results[0].metrics
        }
        logger.info("Evaluation results for bbox:\n%s", create_small_table(means))
        return {"bbox": means}

    def _of_class(self, name: str, number: int, detections: list[dict]) -> ClassResult:
        count, right, wrong = match(number, self._truth, detections)
        metrics: dict[str, float] = {}
        for suffix, style in (("", self._style), *((f"_{style}", style) for style in _STYLES)):
            aps = [
                voc_ap(*_curve(hits, misses, count), _STYLES[style]) if count else np.nan
                for hits, misses in zip(right, wrong)
            ]
            metrics[f"AP{suffix}"] = 100 * float(np.mean(aps))
            metrics[f"AP50{suffix}"], metrics[f"AP75{suffix}"] = 100 * aps[0], 100 * aps[5]
        return ClassResult("bbox", name, count, metrics)


def match(
    number: int, truth: AnnotationTable, detections: list[dict]
) -> tuple[int, np.ndarray, np.ndarray]:
    """Which detections of a class are right, and which are wrong, at each IoU threshold.

    Args:
        number: of the class.
        truth: the data set.
        detections: of this class: "image_id", "bbox" ([x, y, width, height], pixels), "score".

    Returns:
        The number of objects that are not difficult, and (10, detections) bool by falling score of
        right and wrong ones; those of difficult objects are neither.
    """
    rows = np.flatnonzero(truth.category_of == number)
    difficult = truth.difficult[rows]
    of_image = dict.fromkeys(truth.image_ids, rows[:0])  # places among `rows`
    images = truth.image_of[rows]
    for image in np.unique(images).tolist():
        of_image[truth.image_ids[image]] = np.flatnonzero(images == image)
    order = np.argsort([-detection["score"] for detection in detections], kind="stable")
    best = np.zeros(len(detections), int)  # the object that each overlaps most
    overlap = np.full(len(detections), -1.0)
    by_image: dict[str, list[int]] = {}
    for place, index in enumerate(order):
        by_image.setdefault(detections[index]["image_id"], []).append(place)
    for image_id, places in by_image.items():
        known = of_image[image_id]
        if len(known):
            found = torch.tensor([detections[order[place]]["bbox"] for place in places])
            found[:, 2:] += found[:, :2]
            boxes = torch.tensor([truth.written[row] for row in rows[known]])
            highest, which = pairwise_iou(Boxes(found), Boxes(boxes)).max(dim=1)
            overlap[places] = highest.numpy()
            best[places] = known[which.numpy()]
    right = np.zeros((len(_THRESHOLDS), len(detections)), bool)
    wrong = np.ones_like(right)
    for row, threshold in enumerate(_THRESHOLDS):
        near = np.flatnonzero(overlap > threshold)
        wrong[row, near[difficult[best[near]]]] = False
        near = near[~difficult[best[near]]]
        _, first_of_object = np.unique(best[near], return_index=True)
        right[row, near[first_of_object]] = True
    return int((~difficult).sum()), right, wrong & ~right


def _curve(right: np.ndarray, wrong: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision (detections,) after each detection."""
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    # The first detections may be of difficult objects: neither right nor wrong.
    return hits / count, hits / np.maximum(hits + misses, 1)
