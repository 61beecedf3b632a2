"""Step 11: two pretrainings on captioned photographs with the time that is left, and VOC07's mAP.

Bicaptioning and token classification by configs/pretrain/small_R_50.yaml, for half of the time
each: as many iterations as the rate of the first ones allows, validated four times. Then linear
SVMs on checkpoints of both: mAP against the images that were seen.
"""

import json
import math
import os
from pathlib import Path

from . import runs
from .step import Step

START = 45.0  # seconds that a run takes beside its iterations: start, validations, checkpoints
PROBE = 45.0  # seconds of a probe of VOC2007
TASKS = ("bicaptioning", "token_classification")
CONFIG = runs.ROOT / "configs" / "pretrain" / "small_R_50.yaml"


def run(step: Step) -> None:
    points = 2 if step.cuda else 1  # of each curve
    table: dict[str, dict[int, float]] = {}
    for place, task in enumerate(TASKS):
        if step.late(f"pretraining, {task}", PROBE * points + 2 * START):
            return
        coming = len(TASKS) - place
        seconds = (step.left - PROBE * points * coming) / coming - START
        count = _iterations(step, task, seconds) if step.cuda else 4
        folder, period = step.fresh(task), math.ceil(count / points)
        words = f"SOLVER.MAX_ITER {count} SOLVER.WARMUP_ITERS {max(1, count // 20)}"
        words += f" TEST.EVAL_PERIOD {math.ceil(count / 4)} LOG_PERIOD {max(1, count // 100)}"
        words += f" SOLVER.CHECKPOINT_PERIOD {period}"
        words = [*_options(step, task), *words.split(), "OUTPUT_DIR", folder]
        if not runs.tool(step, "pretrain_net.py", "--config-file", CONFIG, *words):
            continue
        of_run, size = runs.metrics(folder), step.scale.batch
        losses = {(i + 1) * size: r["val/loss"] for i, r in of_run.items() if "val/loss" in r}
        step.figure(f"{task}, validation loss by views", losses)
        step.finite(f"{task}: validation", list(losses.values()))
        paths = sorted(folder.glob("model_0*.pth"))[: points - 1] + [folder / "model_final.pth"]
        for number, path in enumerate(paths, 1):
            views = min(number * period, count) * size
            if (found := _probe(step, task, path, views)) is not None:
                table.setdefault(task, {})[views] = found
                step.figure("mAP by views", table)
    told = [f"{task} mAP {list(row.values())[-1]:.1f}" for task, row in table.items()]
    step.headline(", ".join(told))


def _options(step: Step, task: str) -> list[str]:
    scale, data = step.scale, Path(step.options["captions"])
    sizes = (1024, 128, 4000) if step.cuda else (scale.width, scale.crop, scale.vocabulary)
    keys = f"MODEL.DEVICE {step.device.type} MODEL.OBJECTIVE {task}"
    keys += f" MODEL.VISUAL.NAME {scale.network} MODEL.TEXTUAL.HIDDEN_SIZE {sizes[0]}"
    keys += f" DATA.IMAGE_SIZE {sizes[1]} DATA.VOCAB_SIZE {sizes[2]}"
    keys += f" SOLVER.IMS_PER_BATCH {scale.batch} DATA.NUM_WORKERS "
    keys += str(min(15, os.cpu_count() or 1) if step.cuda else 0)
    words = keys.split()
    for split in ("TRAIN", "VAL"):
        words += [f"DATA.{split}_CAPTIONS", str(data / f"captions_{split.lower()}.json")]
        words += [f"DATA.{split}_IMAGES", str(data / "images")]
    return words


def _iterations(step: Step, task: str, seconds: float) -> int:
    """As many as fit into so many seconds, by the rate behind the first ones."""
    words = [*_options(step, task), "DATA.VAL_CAPTIONS", ""]
    trainer = runs.trainer(step, config_file=str(CONFIG), given=words)
    clock = runs.train(trainer, runs.Clock(40, warm_up=70))
    step.free(trainer)
    step.figure(f"{task}, images/s", 40 / clock.seconds * step.scale.batch)
    return max(40, int(40 / clock.seconds * seconds))


def _probe(step: Step, task: str, checkpoint: Path, views: int) -> float | None:
    """VOC07's mAP of a checkpoint's backbone."""
    output, jobs = step.fresh("probe"), min(12, os.cpu_count() or 1)
    words = f"MODEL.DEVICE {step.device.type} DATA.NUM_WORKERS {jobs} SVM.NUM_JOBS {jobs}"
    words += " INPUT.RESIZE 128 INPUT.CROP 112" + ("" if step.cuda else " SVM.COSTS [1.0]")
    paths = ["MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", output, "DATA.ROOT", step.options["voc"]]
    config = runs.ROOT / "configs" / "probes" / "voc07_svm.yaml"
    if not runs.tool(step, "linear_probe.py", "--config-file", config, *paths, *words.split()):
        return None
    found = json.loads((output / "results.json").read_text())["metrics"]["mAP"]
    step.check(f"{task}: mAP after {views:,} views", 0 < found <= 100, f"{found:.2f}")
    return found
