"""The AP of COCO, LVIS and VOC, each with a table of the classes in per_class.csv."""

import contextlib
import csv
import io
import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pycocotools.mask as mask_utils
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    coco_evaluation,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from virtex_d2.annotations.records import read_sound
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.annotations.voc import read_voc_folder
from virtex_d2.engine.compat import has_compiled_ops
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.signals import interruptible

logger = logging.getLogger(__name__)

FILE_NAME = "per_class.csv"
_COLUMNS = ("task", "class", "num_gt", "AP", "AP50", "AP75")


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


@dataclass(frozen=True)
class ClassResult:
    """How well one class is found.

    Attributes:
        task: "bbox" or "segm".
        name: of the class.
        num_gt: its objects in the test set, without crowds and difficult ones.
        metrics: name -> percent, NaN where the class has no object.
        extra: columns that only this kind of data set has.
    """

    task: str
    name: str
    num_gt: int
    metrics: dict[str, float]
    extra: dict[str, str] = field(default_factory=dict)


def _of_classes(
    task: str,
    precision: np.ndarray,
    classes: Sequence[dict],
    annotations: list[dict],
    left_out: str,
    extra: Sequence[str] = (),
) -> list[ClassResult]:
    """AP, AP50 and AP75 of each class of a file of COCO's or LVIS's format.

    Args:
        task: "bbox" or "segm".
        precision: (10 IoU thresholds from 0.5 to 0.95, recall thresholds, classes), -1 where a
            class has no object, as pycocotools and lvis give it.
        classes, annotations: of the file; the former in the order of `precision`.
        left_out: key of annotations that do not count.
        extra: keys of classes for the table.
    """
    counts = Counter(item["category_id"] for item in annotations if not item[left_out])
    precision = np.where(precision > -1, precision, np.nan)
    aps = {
        "AP": 100 * precision.mean(axis=(0, 1)),
        "AP50": 100 * precision[0].mean(axis=0),
        "AP75": 100 * precision[5].mean(axis=0),
    }
    return [
        ClassResult(
            task,
            category["name"],
            counts[category["id"]],
            {metric: float(values[place]) for metric, values in aps.items()},
            {key: category[key] for key in extra},
        )
        for place, category in enumerate(classes)
    ]


def report_classes(folder: str, results: Sequence[ClassResult], dataset_name: str) -> None:
    """Write per_class.csv, with empty cells for what is not known; log classes without an AP."""
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        without = [result.name for result in of_task if not result.num_gt]
        if without:
            shown = ", ".join(without[:10]) + (", ..." if len(without) > 10 else "")
            logger.info(
                "%s: %d of the %d classes have no object in '%s' and are left out of the mean: %s",
                *(task, len(without), len(of_task), dataset_name, shown),
            )
    names = [*_COLUMNS, *(key for result in results for key in (*result.metrics, *result.extra))]
    with (
        atomic_path(os.path.join(folder, FILE_NAME)) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(dict.fromkeys(names)))
        writer.writeheader()
        for result in results:
            known = {"task": result.task, "class": result.name, "num_gt": result.num_gt}
            cells = {
                name: "" if math.isnan(value) else f"{value:.4f}"
                for name, value in result.metrics.items()
            }
            writer.writerow({**known, **cells, **result.extra})


def _log_without_truth(dataset_name: str, folder: str) -> None:
    logger.info(
        "'%s' has no annotations to evaluate on: AP is skipped, the predictions are in %s",
        dataset_name,
        folder,
    )


def _complete(annotations: list[dict[str, Any]], to_rle: Callable[[dict], Any]) -> None:
    """Complete a file's annotations for an evaluation, in place.

    Ids are counted from 1: both packages take a match with the id 0 for none. Without `iscrowd` an
    object is no crowd. Without `area` (pixels) it is the mask's (of `to_rle`), else the box's.
    """
    for number, item in enumerate(annotations, start=1):
        item["id"] = number
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            has_mask = bool(item.get("segmentation"))
            _, _, width, height = item["bbox"]
            item["area"] = float(mask_utils.area(to_rle(item))) if has_mask else width * height


class CocoEvaluator(COCOEvaluator):
    """detectron2's, for files that leave out what it needs, and for no predictions.

    Where nothing is detected, AP is 0; where there is nothing to detect (no object of a size, say),
    it is NaN. A class without an object is left out of the mean.

    As all here it is called with a registered data set's name, tasks ("bbox", "segm") and a folder.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str):
        # The fast implementation is compiled; the official one gives the same AP.
        fast = has_compiled_ops()
        # detectron2 names the class that opens the file, which takes values as they stand there
        with mock.patch.object(coco_evaluation, "COCO", _read_coco):
            super().__init__(dataset_name, tasks, output_dir=output_dir, use_fast_impl=fast)
        if self._do_evaluation:
            _complete(self._coco_api.dataset["annotations"], self._coco_api.annToRLE)
            _index(self._coco_api)
        self._dataset_name = dataset_name
        self._class_results: list[ClassResult] = []

    def evaluate(self, img_ids: list | None = None) -> dict[str, Any]:
        """Task -> metric -> percent; in the first process alone."""
        self._class_results = []
        results = super().evaluate(img_ids)
        if self._class_results:
            report_classes(self._output_dir, self._class_results, self._dataset_name)
        return results

    @interruptible()
    def _eval_predictions(self, *args: Any, **kwargs: Any) -> None:
        super()._eval_predictions(*args, **kwargs)
        if not self._do_evaluation:
            _log_without_truth(self._dataset_name, self._output_dir)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._evaluate_nothing(iou_type)
        self._class_results += _of_classes(
            iou_type,
            # (IoU, recall, class, area range "all", most detections)
            np.asarray(coco_eval.eval["precision"])[:, :, :, 0, -1],
            [self._coco_api.cats[number] for number in coco_eval.params.catIds],
            self._coco_api.dataset["annotations"],
            left_out="iscrowd",
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


def _read_coco(path: str) -> COCO:
    api = COCO()
    api.dataset = read_sound("coco", path)
    _index(api)
    return api


def _index(api: COCO) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()


_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
# What each task's AP looks at. With its box a mask would count as large as the box.
_FIELDS = {"bbox": "bbox", "segm": "segmentation"}


class LvisEvaluator(LVISEvaluator):
    """detectron2's, with the classes of the file instead of those of a version.

    Reports AP, AP50, AP75, by size (APs, APm, APl) and by the frequency of the class in the
    training images (APr, APc, APf): NaN where there is nothing to detect, 0 where nothing is
    detected.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str):
        from lvis import LVIS  # it draws, too, and imports matplotlib: half a second

        with mock.patch.object(LVIS, "_load_json", _read_lvis):
            super().__init__(dataset_name, tasks, output_dir=output_dir)
        annotations = self._lvis_api.dataset["annotations"]
        _complete(annotations, self._lvis_api.ann_to_rle)
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
            _log_without_truth(self._dataset_name, self._output_dir)
            return
        from lvis import LVISEval

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
            results += _of_classes(
                task,
                evaluation.eval["precision"][:, :, :, 0],  # area range "all"
                [self._lvis_api.cats[number] for number in evaluation.params.cat_ids],
                self._lvis_api.dataset["annotations"],
                left_out="ignore",
                extra=("frequency",),
            )
        report_classes(self._output_dir, results, self._dataset_name)

    def _loaded(self, detections: list[dict], task: str) -> Any:
        from lvis import LVISResults

        if not detections:  # which it does not load
            nothing = LVISResults.__new__(LVISResults)
            nothing.logger = logger
            nothing.dataset = {**self._lvis_api.dataset, "annotations": []}
            nothing._create_index()
            return nothing
        fields = ("image_id", "category_id", "score", _FIELDS[task])
        return LVISResults(self._lvis_api, [{key: d[key] for key in fields} for d in detections])


def _read_lvis(_: Any, path: str) -> dict:
    return {"annotations": [], **read_sound("lvis", path)}


_THRESHOLDS = np.arange(50, 100, 5) / 100  # of IoU
_STYLES = {"11point": True, "area": False}


class VocEvaluator(DatasetEvaluator):
    """AP, AP50 and AP75 of boxes, for any folder of VOC's layout.

    As py-faster-rcnn's and detectron2's: the detections of a class go by falling score to the
    object of their image that they overlap most. A second detection of an object is wrong; one of a
    difficult object counts neither way.

    Plain "AP", "AP50" and "AP75" are by 11 points for VOC 2007 (`year` in the metadata) and by the
    area for all others; "AP50_11point", "AP50_area" and so on are both. AP is the mean over IoU
    thresholds of 0.5 to 0.95, as COCO's. A class without an object that is not difficult is left
    out of the means, which detectron2's evaluator counts as 0 or NaN.
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
        report_classes(self._output_dir, results, self._dataset_name)
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


# evaluator_type -> (data set's name, tasks, folder for predictions) -> evaluator.
EVALUATORS = {"coco": CocoEvaluator, "lvis": LvisEvaluator, "pascal_voc": VocEvaluator}
