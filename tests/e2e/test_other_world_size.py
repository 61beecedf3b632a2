"""A run that goes on with another number of processes sees the images that it would have seen."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.captioned_world import THIN, write_world
from tests.processes import python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 6

# The tools' own main, with a trainer that ends after so many iterations, and that writes down what
# its model is given in training: a digest of each image as augmented, with what belongs to it.
RECORDER = """
import hashlib, json, os
from pathlib import Path

from detectron2.utils import comm


def digest(*parts):
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def record(trainer, model, samples_of):
    file = open(Path(trainer.cfg.OUTPUT_DIR) / f"seen-{comm.get_rank()}.jsonl", "a")

    def write(_, given, losses):
        if model.training:
            losses = {name: loss.item() for name, loss in losses.items()}
            line = {"iteration": trainer.iter, "samples": samples_of(given[0]), "losses": losses}
            print(json.dumps(line), file=file, flush=True)

    model.register_forward_hook(write)
    trainer.max_iter = int(os.environ["STOP_AFTER"])
"""
PRETRAIN = """
from pretrain.config import get_pretrain_cfg
from pretrain.trainer import PretrainTrainer
from virtex_d2.runtime.config import load_config
from virtex_d2.runtime.launch import launch
from virtex_d2.runtime.arguments import argument_parser
from virtex_d2.runtime.setup import setup_run


def main(args):
    cfg = load_config(get_pretrain_cfg(), args.config_file, args.opts)
    setup_run(cfg, args)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(args.resume)
    record(trainer, trainer.objective, lambda batch: [
        digest(image, tokens[tokens != 0])  # which are padded to the longest of the process
        for image, tokens in zip(batch["image"], batch["caption_tokens"])
    ])
    trainer.train()


launch(main, argument_parser().parse_args())
"""
DETECT = """
from virtex_d2.config import get_virtex_cfg
from virtex_d2.data.catalog import register_datasets
from virtex_d2.modeling import resolve_norms
from virtex_d2.runtime.config import load_config
from virtex_d2.runtime.launch import launch
from virtex_d2.runtime.arguments import argument_parser
from virtex_d2.runtime.setup import setup_run
from virtex_d2.trainer import DetectionTrainer


def main(args):
    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
    register_datasets(cfg)
    setup_run(cfg, args)
    resolve_norms(cfg)
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(args.resume)
    record(trainer, getattr(trainer.model, "module", trainer.model), lambda batch: [
        digest(sample["image"], sample["instances"].gt_boxes.tensor) for sample in batch
    ])
    trainer.train()


launch(main, argument_parser().parse_args())
"""


def run(script: str, options: list, output: Path, processes: int, stop_after: int) -> list[dict]:
    """Train up to an iteration; what was seen in each, by all processes together."""
    file = output.parent / "record.py"
    file.write_text(RECORDER + script)
    command = [*python(processes), file, "--resume", *options, "OUTPUT_DIR", output]
    done = subprocess.run(
        list(map(str, command)),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STOP_AFTER": str(stop_after),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = []
    for path in output.glob("seen-*.jsonl"):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
    iterations = sorted({line["iteration"] for line in lines})
    return [combined([line for line in lines if line["iteration"] == i]) for i in iterations]


def combined(lines: list[dict]) -> dict:
    """One iteration of all processes: which samples, and the mean of each loss."""
    losses = {
        name: sum(line["losses"][name] for line in lines) / len(lines)
        for name in lines[0]["losses"]
    }
    samples = sorted(sample for line in lines for sample in line["samples"])
    return {"iteration": lines[0]["iteration"], "samples": samples, "losses": losses}


def alone_and_changing(script: str, options: list, tmp_path: Path) -> tuple[list, list]:
    """Of a run in one process, and of one in 1, then 2, then 1: what they have seen."""
    alone = run(script, options, tmp_path / "alone", 1, ITERATIONS)
    changing = []
    for processes, stop_after in ((1, 2), (2, 4), (1, ITERATIONS)):
        changing += run(script, options, tmp_path / "changing", processes, stop_after)
    for path in tmp_path.glob("*/*.pth"):
        path.unlink()  # they take much space
    assert [line["iteration"] for line in changing] == list(range(ITERATIONS))
    return alone, changing


def samples(lines: list[dict]) -> list:
    return [line["samples"] for line in lines]


def test_a_detector_sees_the_same_images_and_its_losses_agree(
    small_detector, shapes_world, tmp_path
):
    """The RPN's losses are means over images: all anchors are learnt from, norms are frozen, and
    images are of one size, because they are padded to the largest of a process.

    The heads' are means over proposals, of which processes have different numbers.
    """
    annotations = shapes_world / "annotations/instances_train.json"
    images = shapes_world / "images/train"
    options = [
        *small_detector("FPN"),
        *("VIRTEX.DATASETS", [["world_train", "coco", str(annotations), str(images)]]),
        *("DATASETS.TRAIN", "('world_train',)", "DATASETS.TEST", "()"),
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        *("DATALOADER.REPEAT_THRESHOLD", 0.9, "INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 2),
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "''"),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100000, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    ]
    alone, changing = alone_and_changing(DETECT, options, tmp_path)
    assert samples(changing) == samples(alone)
    assert len({sample for line in alone for sample in line["samples"]}) > 6  # images, and flips
    assert changing[:2] == alone[:2]
    # The first iteration of two processes begins with the weights of one.
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        assert changing[2]["losses"][name] == pytest.approx(alone[2]["losses"][name], rel=1e-5)


@pytest.mark.parametrize("data", ["mixed", "pipe"])
def test_pretraining_sees_the_same_images_and_captions(data, tmp_path):
    """Batch norm's statistics are of the images of a process, so that losses may differ."""
    write_world(tmp_path / "world", 24)
    options = {
        **THIN,
        "DATA.NUM_WORKERS": 1,
        "DATA.STREAM_BLOCK": 3,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.CNN_LR": 0.01,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        **json.loads((tmp_path / "world" / f"{data}.options.json").read_text()),
        "DATA.VAL_CAPTIONS": "",
    }
    pairs = [part for pair in options.items() for part in pair]
    alone, changing = alone_and_changing(PRETRAIN, pairs, tmp_path)
    assert samples(changing) == samples(alone)
    assert len({sample for line in alone for sample in line["samples"]}) == 4 * ITERATIONS
    assert changing[:2] == alone[:2]
