"""Step 6: Mask R-CNN R50-FPN in three precisions, and a short training with all that follows."""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

from benchmarks import finetune_step
from benchmarks.measuring import peak_memory
from benchmarks.rounds import spread

from . import runs
from .step import Step

SAME = 5e-2  # relative, of the sum of the first losses: boxes are sampled by scores
PROBE = 1e-4  # relative: on a GPU two networks may take different algorithms
TIMED = 15


def run(step: Step) -> None:
    _precisions(step)
    if not step.late("EMA, PreciseBN, evaluation, TTA", 45):
        _training(step)


def _precisions(step: Step) -> None:
    """Steps on random images of the full size."""
    ways = {
        "float32": (),
        "bfloat16, channels_last": ("SOLVER.AMP.ENABLED", True, "VIRTEX.CHANNELS_LAST", True),
        "float16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"),
    }
    if not step.cuda:
        step.instead("float16", "channels_last in float32")
        ways["float32, channels_last"] = ("VIRTEX.CHANNELS_LAST", True)
        del ways["float16"]
    parser = argparse.ArgumentParser()
    finetune_step.add_arguments(parser)
    height, width = map(str, step.scale.detector_size)
    words = ["--images", str(step.scale.detector_images), "--size", height, width]
    args = parser.parse_args([*words, "--device", step.device.type])
    table: dict[str, dict] = {}
    for name, options in ways.items():
        if step.late(f"Mask R-CNN, {name}", 15):
            continue
        cfg = finetune_step.config(args, *_network(step), *options)
        way = finetune_step.Way(args, cfg, stock=False)
        way()
        first, seconds = way.losses(), []
        count = TIMED if step.cuda else 1
        memory = peak_memory(
            lambda way=way, n=count: seconds.extend(way()["step"] for _ in range(n)), step.device
        )
        table[name] = {"ms": 1000 * spread(seconds[count // 3 :])["median"]}
        table[name] |= {"mib": memory / 2**20, "loss": sum(first.values())}
        step.figure("Mask R-CNN", table)
        finite = all(map(math.isfinite, [*first.values(), *way.losses().values()]))
        step.check(f"{name}: finite", finite, f"{sum(way.losses().values()):.3f}")
        apart = abs(table[name]["loss"] / table["float32"]["loss"] - 1)
        step.check(f"{name}: the same first losses", apart <= SAME, f"{apart:.2g} apart")
        del way
        if step.cuda:
            torch.cuda.empty_cache()
    fast = table.get("bfloat16, channels_last")
    if fast and "float32" in table:
        faster = table["float32"]["ms"] / fast["ms"]
        step.limit("bfloat16, channels_last", faster, "times as fast as float32", least=1.1)
        step.headline(f"{fast['ms']:.0f} ms in bfloat16, {faster:.2f} times as fast as float32")


def _training(step: Step) -> None:
    """By the tool, from a pretrained backbone: the probe, EMA, PreciseBN, evaluation, TTA."""
    world, folder = runs.world(step), step.folder / "detector"
    shutil.rmtree(folder, ignore_errors=True)
    backbone = _backbone(step)
    data = [
        [split, "coco", str(world / f"annotations/instances_{split}.json")]
        + [str(world / "images" / split)]
        for split in ("train", "val")
    ]
    sizes = (800, 1333) if step.cuda else (64, 96)
    options = {
        "OUTPUT_DIR": folder,
        "MODEL.DEVICE": step.device.type,
        "MODEL.WEIGHTS": backbone,
        "VIRTEX.DATASETS": data,
        "DATASETS.TRAIN": "('train',)",
        "DATASETS.TEST": "('val',)",
        "DATALOADER.NUM_WORKERS": 4 if step.cuda else 0,
        "INPUT.MIN_SIZE_TRAIN": f"({sizes[0]},)",
        "INPUT.MAX_SIZE_TRAIN": sizes[1],
        "INPUT.MIN_SIZE_TEST": sizes[0],
        "INPUT.MAX_SIZE_TEST": sizes[1],
        "SOLVER.IMS_PER_BATCH": step.scale.detector_images,
        "SOLVER.MAX_ITER": TIMED if step.cuda else 2,
        "SOLVER.STEPS": "(1000,)",
        "SOLVER.WARMUP_ITERS": 1,
        "TEST.EVAL_PERIOD": 0,
        "TEST.PRECISE_BN.NUM_ITER": 5 if step.cuda else 1,
        "TEST.AUG.ENABLED": True,
        "TEST.AUG.MIN_SIZES": f"({sizes[0]},)",
        "VIRTEX.EMA.ENABLED": True,
        "VIRTEX.LOG_PERIOD": 1,
    }
    words = [*_network(step), *(word for pair in options.items() for word in pair)]
    config = runs.ROOT / "configs" / "shapes" / "mask_rcnn_R_50_FPN.yaml"
    code = runs.run_tool("train_net.py", "--config-file", config, *words)
    step.check("training, evaluation and TTA end well", code == 0, f"exit code {code}")
    if code:
        return
    report = json.loads((folder / "transfer_report.json").read_text())
    errors = report["probe"]
    step.figure("probe errors", errors)
    worst = max(errors.values())
    step.check("the backbone computes what the source does", worst <= PROBE, f"{worst:.2g} at most")
    last = runs.metrics(folder)
    found = {key: value for record in last.values() for key, value in record.items()}
    for name in ("bbox/AP", "bbox_TTA/AP"):
        value = found.get(name, math.nan)
        step.check(f"{name} is evaluated", 0 <= value <= 100, f"{value:.2f}")
    saved = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)
    state = saved["model"]
    means = [v for k, v in state.items() if k.endswith("running_mean") and "bottom_up" in k]
    moved = all(bool(mean.isfinite().all()) for mean in means) and any(m.any() for m in means)
    step.check("PreciseBN's statistics", moved, f"of {len(means)} norms")
    ema = saved["ema"]
    step.check("the average of the weights", bool(ema), f"{len(ema)} entries")


def _network(step: Step) -> list[str]:
    """On a CPU heads, proposals and detections are a fraction of the usual, too."""
    if step.cuda:
        return []
    return """
        MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 32
        MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50
        MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 10
        MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.ROI_BOX_HEAD.FC_DIM 32
        MODEL.ROI_MASK_HEAD.CONV_DIM 16 TEST.DETECTIONS_PER_IMAGE 5""".split()


def _backbone(step: Step) -> Path:
    """Of the pretraining step; of another one where that has not been run."""
    path = step.folder / "whole" / "backbone.safetensors"
    if not path.is_file():
        folder = step.folder / "short"
        shutil.rmtree(folder, ignore_errors=True)
        options = ("SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1)
        runs.run_tool("pretrain_net.py", *runs.pretrain_options(step, folder, *options))
        path = folder / "backbone.safetensors"
    return path
