"""Step 11: two pretrainings on captioned photographs with the time that is left, and VOC07's mAP.

Bicaptioning and token classification by configs/pretrain/small_R_50.yaml, for half of the time
each: as many iterations as the rate of the first ones allows, validated four times. Then linear
SVMs on checkpoints of both: mAP against the images that were seen.
"""

import json
import math
import os
import shutil
from pathlib import Path

from pretrain.config import get_pretrain_cfg
from pretrain.trainer import PretrainTrainer
from virtex_d2.runtime.config import load_config

from . import runs
from .step import Step

START = 45.0  # seconds that a run takes beside its iterations: start, validations, checkpoints
PROBE = 45.0  # seconds of a probe of VOC2007
TASKS = ("bicaptioning", "token_classification")


def run(step: Step) -> None:
    points = 2 if step.cuda else 1  # of each curve
    table: dict[str, dict] = {}
    for place, task in enumerate(TASKS):
        left = step.left - PROBE * points * (len(TASKS) - place)
        seconds = left / (len(TASKS) - place) - START
        if step.late(f"pretraining, {task}", PROBE * points + 2 * START):
            return
        folder = step.folder / task
        shutil.rmtree(folder, ignore_errors=True)
        count = _iterations(step, task, seconds) if step.cuda else 4
        options = ("SOLVER.MAX_ITER", count, "SOLVER.WARMUP_ITERS", max(1, count // 20))
        options += ("TEST.EVAL_PERIOD", math.ceil(count / 4), "LOG_PERIOD", max(1, count // 100))
        options += ("SOLVER.CHECKPOINT_PERIOD", math.ceil(count / points))
        words = _options(step, task, folder, *options)
        code = runs.run_tool("pretrain_net.py", "--config-file", _config(), *words)
        step.check(f"{task}, {count} iterations", code == 0, f"exit code {code}")
        if code:
            continue
        losses = {
            iteration + 1: record["val/loss"]
            for iteration, record in runs.metrics(folder).items()
            if "val/loss" in record
        }
        size = step.scale.batch
        step.figure(
            f"{task}, validation loss by views", {str(i * size): v for i, v in losses.items()}
        )
        learns = min(losses.values()) < next(iter(losses.values())) or len(losses) == 1
        step.check(f"{task}: validation loss falls", learns or not step.cuda, str(losses))
        paths = sorted(folder.glob("model_0*.pth"))[: points - 1] + [folder / "model_final.pth"]
        for number, path in enumerate(paths, 1):
            views = number * math.ceil(count / points) * size if path != paths[-1] else count * size
            found = _probe(step, task, path, views)
            if found is not None:
                table.setdefault(task, {})[str(views)] = found
                step.figure("mAP by views", table)
    told = [f"{task} mAP {list(row.values())[-1]:.1f}" for task, row in table.items()]
    step.headline(", ".join(told))


def _config() -> Path:
    return runs.ROOT / "configs" / "pretrain" / "small_R_50.yaml"


def _options(step: Step, task: str, folder: Path, *options: object) -> list[str]:
    data = Path(step.options["captions"])
    keys = {
        "OUTPUT_DIR": folder,
        "MODEL.DEVICE": step.device.type,
        "MODEL.OBJECTIVE": task,
        "MODEL.VISUAL.NAME": step.scale.network,
        "MODEL.TEXTUAL.HIDDEN_SIZE": 1024 if step.cuda else step.scale.width,
        "DATA.IMAGE_SIZE": 128 if step.cuda else step.scale.crop,
        "DATA.TRAIN_CAPTIONS": data / "captions_train.json",
        "DATA.TRAIN_IMAGES": data / "images",
        "DATA.VAL_CAPTIONS": data / "captions_val.json",
        "DATA.VAL_IMAGES": data / "images",
        "DATA.VOCAB_SIZE": 4000 if step.cuda else step.scale.vocabulary,
        "DATA.NUM_WORKERS": min(15, os.cpu_count() or 1) if step.cuda else 0,
        "SOLVER.IMS_PER_BATCH": step.scale.batch,
    }
    return [str(word) for pair in keys.items() for word in pair] + [str(o) for o in options]


def _iterations(step: Step, task: str, seconds: float) -> int:
    """As many as fit into so many seconds, by the rate behind the first ones."""
    folder = step.folder / "rate"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = _options(step, task, folder, "DATA.VAL_CAPTIONS", "")
    trainer = PretrainTrainer(load_config(get_pretrain_cfg(), str(_config()), words))
    clock = runs.train(trainer, runs.Clock(40, warm_up=70))
    rate = 40 / clock.seconds
    step.figure(f"{task}, images/s", rate * step.scale.batch)
    return max(40, int(rate * seconds))


def _probe(step: Step, task: str, checkpoint: Path, views: int) -> float | None:
    """VOC07's mAP of a checkpoint's backbone."""
    output = step.folder / f"probe {task} {views}"
    shutil.rmtree(output, ignore_errors=True)
    config = runs.ROOT / "configs" / "probes" / "voc07_svm.yaml"
    jobs = os.cpu_count() or 1
    options = ["MODEL.WEIGHTS", checkpoint, "OUTPUT_DIR", output, "DATA.ROOT", step.options["voc"]]
    options += ["MODEL.DEVICE", step.device.type, "DATA.NUM_WORKERS", min(12, jobs)]
    options += ["INPUT.RESIZE", 128, "INPUT.CROP", 112, "SVM.NUM_JOBS", min(12, jobs)]
    options += [] if step.cuda else ["INPUT.RESIZE", 64, "INPUT.CROP", 64, "SVM.COSTS", "[1.0]"]
    code = runs.run_tool("linear_probe.py", "--config-file", config, *options)
    step.check(f"{task}: VOC07 after {views:,} views", code == 0, f"exit code {code}")
    if code:
        return None
    found = json.loads((output / "results.json").read_text())["metrics"]["mAP"]
    step.check(f"{task}: mAP is a number", 0 < found <= 100, f"{found:.2f}")
    return found
