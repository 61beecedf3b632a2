"""What a probe leaves: results.json, and a row for each class in per_class.csv."""

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import detectron2
import numpy
import sklearn
import torch
import torchvision
import yaml
from detectron2.config import CfgNode

import virtex_d2
from virtex_d2.engine.files import atomic_path, read_json

RESULTS = "results.json"
PER_CLASS = "per_class.csv"


def write_results(
    cfg: CfgNode,
    identity: Mapping[str, Any],
    metrics: Mapping[str, float],
    per_class: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> str:
    """Write per_class.csv and then results.json into OUTPUT_DIR, each whole or not at all.

    Args:
        cfg: of the run.
        identity: what makes the run this run.
        metrics: in percent.
        per_class: rows with the same keys.
        about: what else there is to say: backbone, data, what was left out.

    Returns:
        The path of results.json.
    """
    table = os.path.join(cfg.OUTPUT_DIR, PER_CLASS)
    with (
        atomic_path(table) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(per_class[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(per_class)
    path = os.path.join(cfg.OUTPUT_DIR, RESULTS)
    content = {
        "task": cfg.TASK,
        "metrics": dict(metrics),
        **about,
        "per_class": list(per_class),
        "seed": cfg.SEED,
        "identity": dict(identity),
        "config": yaml.safe_load(cfg.dump()),
        "versions": _versions(),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read_results(output_dir: str) -> dict[str, Any] | None:
    """What a finished run left in its OUTPUT_DIR; None where there is none."""
    path = os.path.join(output_dir, RESULTS)
    return read_json(path) if os.path.exists(path) else None


def _versions() -> dict[str, str]:
    modules = (virtex_d2, detectron2, torch, torchvision, sklearn, numpy)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }
