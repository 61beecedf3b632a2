"""A run that goes on with another number of processes sees the images that it would have seen."""

import json
from pathlib import Path

import pytest

from tests.e2e.captioned_world import THIN, write_world
from tests.e2e.recording import DETECT, PRETRAIN, run, samples

pytestmark = pytest.mark.slow

ITERATIONS = 6


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
        *small_detector("thin FPN"),
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
