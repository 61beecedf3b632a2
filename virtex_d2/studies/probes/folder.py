"""The VOC07 SVMs on every checkpoint of a pretraining's folder, after the run: mAP by iteration."""

import argparse
import json
import logging
import os
import re
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json, sha256, write_json, write_text
from virtex_d2.engine.identity import refuse_other_run
from virtex_d2.engine.run import setup_run
from virtex_d2.studies.probes.config import check_config
from virtex_d2.studies.probes.data import LabelledImages, load_datasets
from virtex_d2.studies.probes.features import build_network, complete_config
from virtex_d2.studies.probes.run import RESULTS, extraction, settings, voc_svm

logger = logging.getLogger(__name__)

METRICS = "metrics.json"  # of the curve, in lines as those of a training
# Numbered checkpoints: ours by the last iteration, from 0; VirTex's by how many were done.
_NAMES = {re.compile(r"model_(\d+)\.pth"): 0, re.compile(r"checkpoint_(\d+)\.pth"): 1}


def probe_folder(cfg: CfgNode, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Judge the numbered checkpoints of the folder MODEL.WEIGHTS, each as `run_probe` would.

    OUTPUT_DIR gets results.json, and metrics.json with the lines that TEST.PROBE writes during a
    pretraining ("iteration", "probe/mAP", "probe/mAP11").

    Args:
        cfg: of `get_probe_cfg`, with TASK voc_svm. Changed: resolved.
        args: of `virtex_d2.engine.cli.argument_parser`. With --resume the checkpoints that are
            judged already are left out, so that it may be called while the pretraining goes on.

    Returns:
        The metrics in percent by iteration, from 0. Collective.
    """
    checkpoints = numbered_checkpoints(cfg.MODEL.WEIGHTS)
    if cfg.TASK != "voc_svm" or args.eval_only:
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: is a folder, whose checkpoints TASK voc_svm alone "
            "judges, without --eval-only. Name one checkpoint."
        )
    if os.path.realpath(cfg.OUTPUT_DIR) == os.path.realpath(cfg.MODEL.WEIGHTS):
        raise InputError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: is the folder of the checkpoints, whose {METRICS} would "
            "be replaced. Choose another."
        )
    check_config(cfg)
    cfg.DATA.ROOT = expanded(cfg.DATA.ROOT, "DATA.ROOT")
    path = os.path.join(cfg.OUTPUT_DIR, RESULTS)
    stored: dict[str, Any] = read_json(path) if os.path.exists(path) else {}
    if stored and not args.resume:
        raise InputError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: holds the {RESULTS} of another run. Choose another "
            "OUTPUT_DIR, or add --resume if it is this one."
        )
    if stored and "checkpoints" not in stored:
        raise InputError(f"{path}: is of a single checkpoint. Choose another OUTPUT_DIR.")
    setup_run(cfg, args)
    train, test = load_datasets(cfg)
    identity = settings(cfg, train, test)
    refuse_other_run(stored.get("identity", {}), identity)
    known = stored.get("checkpoints", {})
    found = dict(known)  # a checkpoint that was judged may have been removed since
    for iteration, file in checkpoints.items():
        name, digest = os.path.basename(file), sha256(file)
        if known.get(name, {}).get("sha256") == digest:
            logger.info("%s: judged already.", name)
            continue
        metrics = _judge(cfg, file, train, test)
        found[name] = {"iteration": iteration, "sha256": digest, "metrics": metrics}
        found = dict(sorted(found.items(), key=lambda item: item[1]["iteration"]))
        if comm.is_main_process():
            _write(cfg.OUTPUT_DIR, identity, found)
        comm.synchronize()
    rows = [(one["iteration"] + 1, *one["metrics"].values()) for one in found.values()]
    head = ("iterations", *next(iter(found.values()))["metrics"])
    logger.info("Results:\n%s", tabulate(rows, head, floatfmt=".2f"))
    return {one["iteration"]: one["metrics"] for one in found.values()}


def numbered_checkpoints(folder: str) -> dict[int, str]:
    """Find the checkpoints of a pretraining whose names have a number.

    Returns:
        Paths by the last iteration, from 0; ascending.
    """
    found: dict[int, str] = {}
    for name in sorted(os.listdir(folder)):
        for pattern, begin in _NAMES.items():
            if match := pattern.fullmatch(name):
                found[int(match[1]) - begin] = os.path.join(folder, name)
    if not found:
        raise InputError(
            f"MODEL.WEIGHTS {folder}: is a folder without checkpoints such as model_0001999.pth or "
            "checkpoint_2000.pth. Name the folder of a pretraining, or one checkpoint."
        )
    return dict(sorted(found.items()))


def _judge(
    cfg: CfgNode, file: str, train: LabelledImages, test: LabelledImages
) -> dict[str, float]:
    own = cfg.clone()  # which the file completes
    own.defrost()
    own.MODEL.WEIGHTS = file
    for line in complete_config(own):
        logger.info(line)
    network, _ = build_network(own)
    metrics, _ = voc_svm(own, extraction(own, network), train, test, about={})
    return comm.all_gather(metrics)[0]


def _write(folder: str, identity: dict[str, str], found: dict[str, dict[str, Any]]) -> None:
    write_json(os.path.join(folder, RESULTS), {"identity": identity, "checkpoints": found})
    lines = [
        json.dumps(
            {
                "iteration": one["iteration"],
                **{f"probe/{key}": value for key, value in one["metrics"].items()},
            }
        )
        for one in found.values()
    ]
    write_text(os.path.join(folder, METRICS), "\n".join(lines) + "\n")
