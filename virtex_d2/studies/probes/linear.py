"""Softmax classifiers: on cached features, on augmented ones, or trained with the backbone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.probes.data import (
    CentralCrop,
    EpochOrder,
    LabelledImages,
    central_batches,
    positions,
    random_batches,
    refusal,
)
from virtex_d2.studies.probes.features import Classifier, Extraction
from virtex_d2.studies.probes.training import Batches, ClassifierTrainer

# A classifier -> logits and labels of this process's test images.
Scored = Callable[[Classifier], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def train_classifier(
    cfg: CfgNode,
    extract: Extraction,
    train: LabelledImages,
    test: LabelledImages,
    identity: Mapping[str, str],
    resume: bool,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train and test a classifier as TASK and INPUT.AUGMENT say.

    Returns:
        Metrics in percent, and a row for each class.

    Raises:
        RuntimeError: a frozen network has changed.
    """
    frozen = cfg.TASK == "linear"
    on_features = frozen and not cfg.INPUT.AUGMENT
    if on_features:
        features = extract.labelled(train, "training", cfg.DATA.MAX_SKIPPED_SHARE)
        num_images = len(features[1])
        batches = _feature_batches(cfg, *features)
    else:
        num_images = len(train.files)
        batches = lambda start: random_batches(cfg, train, start)  # noqa: E731
    torch.manual_seed(cfg.SEED)
    classifier = Classifier(
        extract.network.feature_size,
        len(train.classes),
        None if on_features else extract.network,
        frozen,
        cfg.SOLVER.AMP.ENABLED,
    ).to(cfg.MODEL.DEVICE)
    if frozen:
        scored = _on_features(cfg, *extract.labelled(test, "test", 0.0))
    else:
        scored = _on_images(cfg, extract.crop, test)
    last = Accuracy(test.classes)

    def evaluate(model: Classifier) -> dict[str, float]:
        nonlocal last
        last = Accuracy(test.classes)
        for logits, true in scored(model):
            last.add(logits, true)
        last.gather()
        return last.metrics()

    trainer = ClassifierTrainer(cfg, classifier, batches, num_images, evaluate, identity)
    trainer.resume_or_load(resume)
    metrics = trainer.train()
    return metrics, last.per_class()


class Accuracy:
    """Counts right answers: the first one (top-1), and any of the first five.

    Args:
        classes: names; top-5 is told where there are more than five.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = classes
        # a row for each class: images, right at the first, right among the first five
        self._counts = torch.zeros(len(classes), 3, dtype=torch.int64)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count logits (N, C) and labels (N,) of images that were not added before."""
        best = logits.topk(min(5, len(self._classes)), dim=1).indices.cpu()
        right = best == labels.cpu()[:, None]
        counts = [torch.ones(len(labels)), right[:, 0], right.any(1)]
        self._counts.index_add_(0, labels.cpu(), torch.stack(counts, 1).to(torch.int64))

    def gather(self) -> None:
        """Add up what all processes counted; to be called in each, once, at the end."""
        self._counts = torch.stack(comm.all_gather(self._counts)).sum(0)

    def metrics(self) -> dict[str, float]:
        """Give the percent over all images: "top1", and "top5" where it says something."""
        images, first, among_five = self._counts.sum(0).tolist()
        metrics = {"top1": 100 * first / images}
        if len(self._classes) > 5:
            metrics["top5"] = 100 * among_five / images
        return metrics

    def per_class(self) -> list[dict[str, Any]]:
        """Give a row for each class; accuracies of a class without test images are None."""
        return [
            {"class": name, "images": images, "top1": 100 * first / images if images else None}
            for name, (images, first, _) in zip(self._classes, self._counts.tolist())
        ]


def _feature_batches(cfg: CfgNode, values: torch.Tensor, labels: torch.Tensor) -> Batches:
    def batches(start_iteration: int) -> Iterator[dict[str, torch.Tensor]]:
        order = EpochOrder(len(labels), cfg.SEED)
        for batch in positions(cfg.SOLVER.IMS_PER_BATCH, start_iteration):
            rows = torch.tensor([order(p // len(labels))[p % len(labels)] for p in batch])
            yield {"input": values[rows], "label": labels[rows]}

    return batches


def _on_features(cfg: CfgNode, values: torch.Tensor, labels: torch.Tensor) -> Scored:
    mine = slice(comm.get_rank(), None, comm.get_world_size())

    def scored(model: Classifier) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for some_values, some_labels in zip(values[mine].split(4096), labels[mine].split(4096)):
            yield model.fc(some_values.to(cfg.MODEL.DEVICE)), some_labels

    return scored


def _on_images(cfg: CfgNode, crop: CentralCrop, test: LabelledImages) -> Scored:
    indices = range(comm.get_rank(), len(test.files), comm.get_world_size())
    labels = torch.from_numpy(test.labels)

    def scored(model: Classifier) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for found, pixels, unusable in central_batches(
            test.files, indices, crop, cfg.TEST.IMS_PER_BATCH, cfg.DATA.NUM_WORKERS
        ):
            if unusable:
                named = {test.files[index]: reason for index, reason in unusable.items()}
                raise InputError(refusal(named, "test images"))
            yield model({"input": pixels}), labels[found]

    return scored
