"""A probe from its config to its results: results.json, and per_class.csv of each class."""

import argparse
import csv
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import detectron2
import numpy as np
import sklearn
import torch
import torchvision
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

import virtex_d2
from virtex_d2.checkpoint.transfer import config_preprocessing
from virtex_d2.detection.modeling import resolve_norms
from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path, read_json
from virtex_d2.engine.identity import refuse_other_run
from virtex_d2.engine.run import setup_run
from virtex_d2.studies.probes.config import check_config
from virtex_d2.studies.probes.data import CentralCrop, LabelledImages, load_datasets
from virtex_d2.studies.probes.features import (
    Extraction,
    PooledResNet,
    build_network,
    complete_config,
)
from virtex_d2.studies.probes.linear import train_classifier
from virtex_d2.studies.probes.svm import LabelledFeatures, evaluate_svms

logger = logging.getLogger(__name__)

RESULTS = "results.json"
PER_CLASS = "per_class.csv"
# Keys that make a run of a task this run; where data and weights are does not.
_KEYS = {
    "voc_svm": (
        *("SVM.COSTS", "SVM.FOLDS", "SVM.POSITIVE_WEIGHT", "SVM.MAX_ITER", "SVM.DIFFICULT"),
        "MODEL.RESNETS.OUT_FEATURES",
    ),
    "linear": (
        *("SOLVER.EPOCHS", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MOMENTUM"),
        *("SOLVER.WEIGHT_DECAY", "SOLVER.SCHEDULE", "SOLVER.STEPS", "SOLVER.GAMMA"),
        *("SOLVER.AMP.ENABLED", "INPUT.AUGMENT", "INPUT.CROP_SCALE", "INPUT.CROP_RATIO"),
    ),
}
_KEYS["finetune"] = (*_KEYS["linear"], "MODEL.RESNETS.NORM")

Rows = Sequence[Mapping[str, Any]]


def run_probe(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Run what TASK says, and write results.json and per_class.csv into OUTPUT_DIR.

    Args:
        cfg: of `get_probe_cfg`. Changed: completed from the checkpoint, and resolved.
        args: of `virtex_d2.engine.cli.argument_parser`. With --resume a finished run is left as it
            is, and an interrupted one goes on.

    Returns:
        The metrics, in percent.
    """
    if args.eval_only:
        raise InputError("--eval-only: a probe trains and evaluates in one; leave the flag out.")
    check_config(cfg)
    cfg.DATA.ROOT = expanded(cfg.DATA.ROOT, "DATA.ROOT")
    path = os.path.join(cfg.OUTPUT_DIR, RESULTS)
    finished = read_json(path) if os.path.exists(path) else None
    if finished and not args.resume:
        raise InputError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: holds the {RESULTS} of another run. Choose another "
            "OUTPUT_DIR, or add --resume if it is this one."
        )
    changes = complete_config(cfg)
    # A run that is finished keeps its config.yaml, whatever it is resumed with.
    setup_run(cfg, argparse.Namespace(**{**vars(args), "eval_only": finished is not None}))
    for line in changes:
        logger.info(line)
    resolve_norms(cfg)
    cfg.freeze()
    train, test = load_datasets(cfg)
    for name, images in (("Training", train), ("Test", test)):
        logger.info(
            "%s set: %s, %d images, %d classes",
            *(name, images.source, len(images.files), len(images.classes)),
        )
    network, about_network = build_network(cfg)
    identity = _identity(cfg, about_network["tensors_sha256"], train, test)
    if finished:
        refuse_other_run(finished["identity"], identity)
        logger.info("%s: finished already, nothing is done.", cfg.OUTPUT_DIR)
        return finished["metrics"]
    about_network["preprocessing"] = config_preprocessing(cfg).config()
    extract = extraction(cfg, network)
    about: dict[str, Any] = {
        "backbone": about_network,
        "data": {"train": _about(cfg, train), "test": _about(cfg, test)},
    }
    if cfg.TASK == "voc_svm":
        metrics, rows = voc_svm(cfg, extract, train, test, about)
    else:
        metrics, rows = train_classifier(cfg, extract, train, test, identity, args.resume)
    if comm.is_main_process():
        _write_results(cfg, identity, metrics, rows, about)
        logger.info("Results:\n%s", tabulate(metrics.items(), ("metric", "%"), floatfmt=".2f"))
        logger.info("They are in %s and the table beside it.", path)
    comm.synchronize()
    return metrics


def extraction(cfg: CfgNode, network: PooledResNet) -> Extraction:
    """How the features of a run are computed; `cfg` is complete."""
    return Extraction(
        network,
        cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        CentralCrop(cfg.INPUT.RESIZE, cfg.INPUT.CROP, cfg.INPUT.FORMAT),
        cfg.DATA.CACHE_DIR,
        cfg.TEST.IMS_PER_BATCH,
        cfg.DATA.NUM_WORKERS,
    )


def voc_svm(
    cfg: CfgNode,
    extract: Extraction,
    train: LabelledImages,
    test: LabelledImages,
    about: dict[str, Any],
) -> tuple[dict[str, float], Rows]:
    """Metrics and a row for each class; empty in all processes but the first.

    Args:
        cfg, extract, train, test: of the run.
        about: takes what classes are left out, and why.
    """
    parts = []
    for images, what, share in (
        (train, "training", cfg.DATA.MAX_SKIPPED_SHARE),
        (test, "test", 0.0),
    ):
        values, labels = extract.labelled(images, what, share)
        parts.append((values.numpy(), labels.numpy()))
    if not comm.is_main_process():
        return {}, []
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    sizes = extract.network.sizes
    bounds = np.cumsum(list(sizes.values()))[:-1]
    by_part = [(np.split(values, bounds, axis=1), labels) for values, labels in parts]
    for place, name in enumerate(sizes):
        pairs = [(_unit(values[place]), labels) for values, labels in by_part]
        found = _judge(cfg, train.classes, pairs, test.source, about)
        several = len(sizes) > 1
        metrics |= {f"{name}/{key}" if several else key: value for key, value in found[0].items()}
        rows += [{"features": name, **row} if several else row for row in found[1]]
    return metrics, rows


def _unit(values: np.ndarray) -> np.ndarray:
    """Scale rows to an L2 norm of 1; rows of zeros stay zeros."""
    return torch.nn.functional.normalize(torch.from_numpy(values), dim=1).numpy()


def _judge(
    cfg: CfgNode,
    classes: Sequence[str],
    parts: Sequence[LabelledFeatures],
    source: str,
    about: dict[str, Any],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The same of one stage's features, of training and of test images."""
    results, left_out = evaluate_svms(cfg, classes, *parts)
    about["left_out"] = left_out
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(f"{source}: no class can be evaluated: {reasons}.")
    metrics = {
        "mAP11": 100 * float(np.mean([result.AP11 for result in results])),
        "mAP": 100 * float(np.mean([result.AP for result in results])),
    }
    if left_out:
        logger.warning(
            "The means are over %d of %d classes, without %s",
            *(len(results), len(classes), ", ".join(left_out)),
        )
    percent = ("AP11", "AP", "cross_validated")
    rows = [
        {
            ("class" if key == "name" else key): 100 * value if key in percent else value
            for key, value in asdict(result).items()
        }
        for result in results
    ]
    return metrics, rows


def _write_results(
    cfg: CfgNode,
    identity: Mapping[str, Any],
    metrics: Mapping[str, float],
    rows: Rows,
    about: Mapping[str, Any],
) -> None:
    """Write per_class.csv and then results.json, each whole or not at all."""
    with (
        atomic_path(os.path.join(cfg.OUTPUT_DIR, PER_CLASS)) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    modules = (virtex_d2, detectron2, torch, torchvision, sklearn, np)
    content = {
        "task": cfg.TASK,
        "metrics": dict(metrics),
        **about,
        "per_class": list(rows),
        "seed": cfg.SEED,
        "identity": dict(identity),
        "config": yaml.safe_load(cfg.dump()),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
    }
    with atomic_path(os.path.join(cfg.OUTPUT_DIR, RESULTS)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _identity(
    cfg: CfgNode, tensors: str, train: LabelledImages, test: LabelledImages
) -> dict[str, str]:
    """What makes a run this run, as texts by name."""
    preprocessing = config_preprocessing(cfg).config()
    return {
        **settings(cfg, train, test),
        "the backbone": tensors,
        "its preprocessing": ", ".join(map(str, preprocessing.values())),
    }


def settings(cfg: CfgNode, train: LabelledImages, test: LabelledImages) -> dict[str, str]:
    """What makes a run this run, but for its backbone; as texts by name."""
    keys = ("TASK", "SEED", "INPUT.RESIZE", "INPUT.CROP", *_KEYS[cfg.TASK])
    return {
        **{key: str(_value(cfg, key)) for key in keys},
        "the training set": _digest(cfg, train),
        "the test set": _digest(cfg, test),
    }


def _value(cfg: CfgNode, key: str) -> Any:
    value: Any = cfg
    for name in key.split("."):
        value = value[name]
    # as after a turn through YAML
    return list(value) if isinstance(value, tuple) else value


def _digest(cfg: CfgNode, images: LabelledImages) -> str:
    """Of names and labels: a data set may move."""
    root = cfg.DATA.ROOT or os.path.commonpath([os.path.dirname(file) for file in images.files])
    files = [os.path.relpath(file, root) for file in images.files]
    digest = hashlib.sha256(repr((images.classes, files)).encode())
    digest.update(np.ascontiguousarray(images.labels))
    return f"{len(images.files)} images, {digest.hexdigest()[:16]}"


def _about(cfg: CfgNode, images: LabelledImages) -> Mapping[str, Any]:
    return {
        "source": images.source,
        "images": len(images.files),
        "classes": len(images.classes),
        "digest": _digest(cfg, images),
    }
