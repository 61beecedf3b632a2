"""Step 6: Mask R-CNN R50-FPN in three precisions, and a short training with all that follows."""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from benchmarks import finetune_step
from benchmarks.measuring import peak_memory

from . import runs
from .step import Step

SAME = 5e-2  # relative, of the sum of the first losses: boxes are sampled by scores
PROBE = 1e-4  # relative: on a GPU two networks may take different algorithms
TIMED = 15
# On a CPU heads, proposals and detections are a fraction of the usual, as is the network.
TINY = """
    MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50
    MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 10
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.ROI_BOX_HEAD.FC_DIM 32
    MODEL.ROI_MASK_HEAD.CONV_DIM 16 TEST.DETECTIONS_PER_IMAGE 5"""
TRAINING = """
    DATASETS.TRAIN ('train',) DATASETS.TEST ('val',) SOLVER.STEPS (1000,) SOLVER.WARMUP_ITERS 1
    TEST.EVAL_PERIOD 0 TEST.AUG.ENABLED True VIRTEX.EMA.ENABLED True VIRTEX.LOG_PERIOD 1
    INPUT.MIN_SIZE_TRAIN ({0},) INPUT.MAX_SIZE_TRAIN {1} INPUT.MIN_SIZE_TEST {0}
    INPUT.MAX_SIZE_TEST {1} TEST.AUG.MIN_SIZES ({0},) SOLVER.MAX_ITER {2}
    TEST.PRECISE_BN.NUM_ITER {3} DATALOADER.NUM_WORKERS {3}"""


def run(step: Step) -> None:
    _precisions(step)
    if not step.late("EMA, PreciseBN, evaluation, TTA", 45):
        _training(step)


def _precisions(step: Step) -> None:
    """Steps on random images of the full size."""
    ways = {
        "float32": "",
        "bfloat16, channels_last": "SOLVER.AMP.ENABLED True VIRTEX.CHANNELS_LAST True",
        "float16": "SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE float16",
    }
    if not step.cuda:
        step.instead("float16", "channels_last in float32")
        del ways["float16"]
        ways["float32, channels_last"] = "VIRTEX.CHANNELS_LAST True"
    parser = argparse.ArgumentParser()
    finetune_step.add_arguments(parser)
    size = " ".join(map(str, step.scale.detector_size))
    words = f"--images {step.scale.detector_images} --size {size} --device {step.device.type}"
    args = parser.parse_args(words.split())
    tiny = [] if step.cuda else TINY.split()
    table: dict[str, dict] = {}
    for name, options in ways.items():
        if not step.late(f"Mask R-CNN, {name}", 15):
            cfg = finetune_step.config(args, *tiny, *options.split())
            table[name] = _timed(step, name, finetune_step.Way(args, cfg, stock=False))
            step.figure("Mask R-CNN", table)
            apart = abs(table[name]["loss"] / table["float32"]["loss"] - 1)
            step.check(f"{name}: the same first losses", apart <= SAME, f"{apart:.2g} apart")
    if len(table) > 1:
        fast, slow = table["bfloat16, channels_last"]["ms"], table["float32"]["ms"]
        step.limit("bfloat16, channels_last", slow / fast, "times float32's rate", least=1.1)
        step.headline(f"{fast:.0f} ms in bfloat16, {slow / fast:.2f} times as fast as float32")


def _timed(step: Step, name: str, way: finetune_step.Way) -> dict[str, float]:
    way()
    first, seconds = sum(way.losses().values()), []
    count = TIMED if step.cuda else 1

    def several() -> None:
        seconds.extend(way()["step"] for _ in range(count))

    memory = peak_memory(several, step.device)
    step.finite(f"Mask R-CNN, {name}", [first, *way.losses().values()])
    step.free(way)
    ms = 1000 * statistics.median(seconds[count // 3 :])
    return {"ms": ms, "mib": memory / 2**20, "loss": first}


def _training(step: Step) -> None:
    """By the tool, from a pretrained backbone: the probe, EMA, PreciseBN, evaluation, TTA."""
    world, folder = runs.world(step), step.fresh("detector")
    numbers = (800, 1333, TIMED, 4) if step.cuda else (64, 96, 2, 1)
    words = ["OUTPUT_DIR", folder, "MODEL.DEVICE", step.device.type]
    words += ["MODEL.WEIGHTS", _backbone(step), "VIRTEX.DATASETS"]
    files = ((s, world / f"annotations/instances_{s}.json") for s in ("train", "val"))
    words += [[[s, "coco", str(file), str(world / "images" / s)] for s, file in files]]
    words += ["SOLVER.IMS_PER_BATCH", step.scale.detector_images]
    words += TRAINING.format(*numbers).split() + ([] if step.cuda else TINY.split())
    config = runs.ROOT / "configs" / "shapes" / "mask_rcnn_R_50_FPN.yaml"
    if not runs.tool(step, "train_net.py", "--config-file", config, *words):
        return
    errors = json.loads((folder / "transfer_report.json").read_text())["probe"]
    step.figure("probe errors", errors)
    worst = max(errors.values())
    step.check("the backbone computes what the source does", worst <= PROBE, f"{worst:.2g} at most")
    records = runs.metrics(folder).values()
    found = {key: value for record in records for key, value in record.items()}
    for name in ("bbox/AP", "bbox_TTA/AP"):
        value = found.get(name, math.nan)
        step.check(f"{name} is evaluated", 0 <= value <= 100, f"{value:.2f}")
    saved = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)
    state, ema = saved["model"], saved["ema"]["model"]
    means = [name for name in state if name.endswith("running_mean") and "bottom_up" in name]
    right = all(state[name].isfinite().all() and state[name].any() for name in means)
    step.check("PreciseBN's statistics", right and bool(means), f"of {len(means)} norms")
    right = all(value.isfinite().all() for value in ema.values() if value.is_floating_point())
    moved = any(not torch.equal(ema[name], state[name]) for name in state)
    step.check("the average of the weights", right and moved, f"{len(ema)} tensors")


def _backbone(step: Step) -> Path:
    """Of the pretraining step; of another run where that has left none."""
    path = step.folder / "pretraining" / "whole" / "backbone.safetensors"
    if not path.is_file():
        folder = step.fresh("short")
        words = ("SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1)
        runs.tool(step, "pretrain_net.py", *runs.options(step, folder, *words))
        path = folder / "backbone.safetensors"
    return path
