"""The AP of each class: a table in a file, and means that leave out what cannot be measured."""

import csv
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from virtex_d2.engine.files import atomic_path

logger = logging.getLogger(__name__)

FILE_NAME = "per_class.csv"
_COLUMNS = ("task", "class", "num_gt", "AP", "AP50", "AP75")


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


def class_aps(precision: np.ndarray) -> dict[str, np.ndarray]:
    """AP, AP50 and AP75 of each class, in percent, NaN where it has no object.

    Args:
        precision: (10 IoU thresholds from 0.5 to 0.95, recall thresholds, classes), -1 where a
            class has no object, as COCO's and LVIS's evaluations give it.
    """
    precision = np.where(precision > -1, precision, np.nan)
    return {
        "AP": 100 * precision.mean(axis=(0, 1)),
        "AP50": 100 * precision[0].mean(axis=0),
        "AP75": 100 * precision[5].mean(axis=0),
    }


def log_without_objects(results: Iterable[ClassResult], dataset_name: str) -> None:
    """Count in the log the classes that no AP is known of."""
    results = list(results)
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        without = [result.name for result in of_task if not result.num_gt]
        if without:
            shown = ", ".join(without[:10]) + (", ..." if len(without) > 10 else "")
            logger.info(
                "%s: %d of the %d classes have no object in '%s' and are left out of the mean: %s",
                task,
                len(without),
                len(of_task),
                dataset_name,
                shown,
            )


def log_without_truth(dataset_name: str, folder: str) -> None:
    """Say in the log that there are predictions and no AP."""
    logger.info(
        "'%s' has no annotations to evaluate on: AP is skipped, the predictions are in %s",
        dataset_name,
        folder,
    )


def write_per_class(folder: str, results: Sequence[ClassResult]) -> None:
    """Write per_class.csv: a line for each task and class, an empty cell for what is not known."""
    names = [*_COLUMNS, *dict.fromkeys(key for r in results for key in (*r.metrics, *r.extra))]
    names = list(dict.fromkeys(names))
    with (
        atomic_path(os.path.join(folder, FILE_NAME)) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for result in results:
            cells = {name: _cell(value) for name, value in result.metrics.items()}
            known = {"task": result.task, "class": result.name, "num_gt": result.num_gt}
            writer.writerow({**known, **cells, **result.extra})


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
