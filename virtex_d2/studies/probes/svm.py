"""One-vs-all linear SVMs on frozen features, and their average precision: the VOC07 protocol.

Goyal et al., arXiv 1905.01235, section 5.1 (costs, class weight, folds), as VirTex uses it (arXiv
2006.06666, section 4.1).
"""

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from detectron2.config import CfgNode
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

logger = logging.getLogger(__name__)

# Features (N, D), and labels: (N, C) of all classes as in `LabelledImages`, or (N,) of one.
LabelledFeatures = tuple[np.ndarray, np.ndarray]


def average_precision_11(positives: np.ndarray, scores: np.ndarray) -> float:
    """Compute VOC2007's average precision: the mean, over the recalls 0, 0.1, ..., 1, of the best
    precision at that recall or a higher one (Everingham et al., IJCV 2010, section 4.2).

    Recalls are compared as whole numbers, so that three of ten positives reach 0.3. Images of equal
    score are ranked together: their order in the file does not matter.

    Args:
        positives: (N,) bool.
        scores: (N,), the higher the surer.

    Returns:
        0 to 1; NaN where there is no positive.
    """
    total = int(positives.sum())
    if total == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positives[order])
    # the last image of each score: only there is a threshold between two ranks
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    found, precision = found[ends], found[ends] / (ends + 1)
    best = [precision[10 * found >= level * total].max() for level in range(11)]
    return float(np.mean(best))


@dataclass(frozen=True)
class ClassResult:
    """One class's SVM on the test split.

    Attributes:
        name: of the class.
        AP11: 11-point average precision.
        AP: area under the precision-recall curve, which the released code calls AP.
        cost: the chosen one.
        cross_validated: mean AP over the folds with that cost, on the training split.
        train_positives, train_ignored, test_positives, test_ignored: images; ignored are those
            with difficult objects of the class only.
        unconverged: fits that reached SVM.MAX_ITER.
    """

    name: str
    AP11: float
    AP: float
    cost: float
    cross_validated: float
    train_positives: int
    train_ignored: int
    test_positives: int
    test_ignored: int
    unconverged: int


def evaluate_svms(
    cfg: CfgNode,
    classes: Sequence[str],
    train: LabelledFeatures,
    test: LabelledFeatures,
) -> tuple[list[ClassResult], dict[str, str]]:
    """Train and test one SVM for each class.

    Args:
        cfg: SVM's keys and the SEED.
        classes: C names.
        train, test: features of unit norm, and labels.

    Returns:
        Results in the order of the classes, and the reason of each class that is left out, because
        it has no AP, or no cost that cross-validation could choose.
    """
    left_out = unfit_classes(cfg, classes, train[1], test[1])
    for name, reason in left_out.items():
        logger.warning("Class %s is left out: %s", name, reason)
    wanted = [(column, name) for column, name in enumerate(classes) if name not in left_out]
    results: list[ClassResult] = []
    start = time.perf_counter()
    jobs = (
        delayed(_evaluate_one)(
            cfg, name, (train[0], train[1][:, column]), (test[0], test[1][:, column])
        )
        for column, name in wanted
    )
    for result in Parallel(n_jobs=cfg.SVM.NUM_JOBS, return_as="generator")(jobs):
        results.append(result)
        seconds = (time.perf_counter() - start) / len(results) * (len(wanted) - len(results))
        logger.info(
            "%-12s AP11 %.2f, AP %.2f; cost %g of cross-validated AP %.2f; %d of %d, eta: %s%s",
            result.name,
            100 * result.AP11,
            100 * result.AP,
            result.cost,
            100 * result.cross_validated,
            len(results),
            len(wanted),
            timedelta(seconds=round(seconds)),
            f"; {result.unconverged} fits reached SVM.MAX_ITER" if result.unconverged else "",
        )
    return results, left_out


def unfit_classes(
    cfg: CfgNode, classes: Sequence[str], train: np.ndarray, test: np.ndarray
) -> dict[str, str]:
    """Say of the classes that cannot be evaluated why.

    Args:
        cfg: SVM's keys.
        classes: C names.
        train, test: (N, C) labels, as in `LabelledImages`.
    """
    reasons = {
        name: _unfit(train[:, column], test[:, column], cfg.SVM.FOLDS, cfg.SVM.DIFFICULT)
        for column, name in enumerate(classes)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _unfit(train: np.ndarray, test: np.ndarray, folds: int, difficult: str) -> str:
    """Why a class cannot be evaluated; "" where it can."""
    negatives = (train != 1) if difficult == "negative" else (train == -1)
    for kind, count in (("positive", (train == 1).sum()), ("negative", negatives.sum())):
        if count < folds:
            return f"{count} {kind} training images, and {folds} folds need as many"
    for kind, sign in (("positive", 1), ("negative", -1)):
        if not (test == sign).any():  # without negatives any order is perfect
            return f"no {kind} test image"
    return ""


def _evaluate_one(
    cfg: CfgNode, name: str, train: LabelledFeatures, test: LabelledFeatures
) -> ClassResult:
    ignored = train[1] == 0
    kept = np.ones(len(ignored), bool) if cfg.SVM.DIFFICULT == "negative" else ~ignored
    x, y = train[0][kept], np.where(train[1][kept] == 1, 1, -1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        # over stratified folds, in the order of the list and not shuffled, as the recipe
        scores = [
            cross_val_score(
                _svm(cfg, cost), x, y, cv=cfg.SVM.FOLDS, scoring="average_precision"
            ).mean()
            for cost in cfg.SVM.COSTS
        ]
        best = int(np.argmax(scores))  # the first of equals: the stronger regularisation
        svm = _svm(cfg, cfg.SVM.COSTS[best]).fit(x, y)
    counted = test[1] != 0
    decisions, positives = svm.decision_function(test[0][counted]), test[1][counted] == 1
    return ClassResult(
        name=name,
        AP11=average_precision_11(positives, decisions),
        AP=float(average_precision_score(positives, decisions)),
        cost=float(cfg.SVM.COSTS[best]),
        cross_validated=float(scores[best]),
        train_positives=int((y == 1).sum()),
        train_ignored=int(ignored.sum()),
        test_positives=int(positives.sum()),
        test_ignored=int((~counted).sum()),
        unconverged=sum(issubclass(one.category, ConvergenceWarning) for one in caught),
    )


def _svm(cfg: CfgNode, cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost,
        class_weight={1: cfg.SVM.POSITIVE_WEIGHT, -1: 1.0},
        penalty="l2",
        loss="squared_hinge",
        # the primal where there are more images than features: as exact, and without chance
        dual="auto",
        max_iter=cfg.SVM.MAX_ITER,
        random_state=cfg.SEED,
    )
