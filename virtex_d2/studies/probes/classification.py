"""Softmax classifiers: on cached features, on augmented ones, or trained with the backbone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.probes.accuracy import Accuracy
from virtex_d2.studies.probes.crops import (
    CentralCrop,
    EpochOrder,
    RandomBatches,
    RandomCrop,
    RandomCrops,
    central_batches,
    positions,
    refusal,
)
from virtex_d2.studies.probes.datasets import LabelledImages
from virtex_d2.studies.probes.features import Extraction, usable_rows
from virtex_d2.studies.probes.network import Classifier
from virtex_d2.studies.probes.training import Batches, ClassifierTrainer


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
        values, labels = _features(cfg, extract, train, "training")
        num_images = len(labels)
        batches = _feature_batches(cfg, values, labels)
    else:
        num_images = len(train.files)
        batches = _random_batches(cfg, train)
    torch.manual_seed(cfg.SEED)
    classifier = Classifier(
        extract.network.feature_size,
        len(train.classes),
        None if on_features else extract.network,
        frozen,
        cfg.SOLVER.AMP.ENABLED,
    ).to(cfg.MODEL.DEVICE)
    if frozen:
        test_values, test_labels = _features(cfg, extract, test, "test")
        scored = _on_features(cfg, test_values, test_labels)
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


def _features(
    cfg: CfgNode, extract: Extraction, images: LabelledImages, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of the usable images, on the CPU."""
    features = extract(images.files, f"{what} images")
    share = cfg.DATA.MAX_SKIPPED_SHARE if what == "training" else 0.0
    rows = usable_rows(features, images.files, share, what)
    labels = torch.from_numpy(images.labels)
    if len(rows) == len(labels):  # no copy of what may be ten gigabytes
        return features.values, labels
    return features.values[rows], labels[rows]


def _feature_batches(cfg: CfgNode, values: torch.Tensor, labels: torch.Tensor) -> Batches:
    def batches(start_iteration: int) -> Iterator[dict[str, torch.Tensor]]:
        order = EpochOrder(len(labels), cfg.SEED)
        rank, world_size = comm.get_rank(), comm.get_world_size()
        for batch in positions(cfg.SOLVER.IMS_PER_BATCH, start_iteration, rank, world_size):
            rows = torch.tensor([order(p // len(labels))[p % len(labels)] for p in batch])
            yield {"input": values[rows], "label": labels[rows]}

    return batches


def _random_batches(cfg: CfgNode, train: LabelledImages) -> Batches:
    crop = RandomCrop(
        cfg.INPUT.CROP,
        tuple(cfg.INPUT.CROP_SCALE),
        tuple(cfg.INPUT.CROP_RATIO),
        cfg.INPUT.FORMAT,
    )
    dataset = RandomCrops(train.files, train.labels, crop, cfg.SEED)

    def batches(start_iteration: int) -> RandomBatches:
        return RandomBatches(
            dataset,
            cfg.SOLVER.IMS_PER_BATCH,
            start_iteration,
            cfg.DATA.NUM_WORKERS,
            cfg.DATA.MAX_SKIPPED_SHARE * len(train.files),
        )

    return batches


# What tests a classifier: its model -> logits and labels of this process's test images.


def _on_features(cfg: CfgNode, values: torch.Tensor, labels: torch.Tensor):
    mine = slice(comm.get_rank(), None, comm.get_world_size())

    def scored(model: Classifier) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(values[mine].split(4096), labels[mine].split(4096))
        for some_values, some_labels in pairs:
            yield model.fc(some_values.to(cfg.MODEL.DEVICE)), some_labels

    return scored


def _on_images(cfg: CfgNode, crop: CentralCrop, test: LabelledImages):
    indices: Sequence[int] = range(comm.get_rank(), len(test.files), comm.get_world_size())
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
