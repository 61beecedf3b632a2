"""A detector's training that is killed and resumed ends with the weights of one that was not."""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.e2e.forked_runs import Process, shared_server
from tests.e2e.killing import differences, kill_tree
from tests.processes import python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 12
SEED = int(os.environ.get("KILL_SEED", "1"))
EMA = ("VIRTEX.EMA.ENABLED", True, "VIRTEX.EMA.DECAY", 0.5, "VIRTEX.ACCUMULATE", 2)
CASES = {
    "FPN-0w-1p": ("thin FPN", 0, 1, (*EMA, "SOLVER.IMS_PER_BATCH", 4)),
    "FPN-2w-1p-repeat-factors": (
        *("thin FPN", 2, 1),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
        + ("DATALOADER.REPEAT_THRESHOLD", 0.9),
    ),
    "FPN-1w-1p-bfloat16": ("thin FPN", 1, 1, ("SOLVER.AMP.ENABLED", True)),
    "FPN-0w-2p": ("thin FPN", 0, 2, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_detector_resumes_to_bit_identical_weights(
    name, shapes_world, small_detector, tmp_path
):
    base, workers, processes, more = CASES[name]
    options = [
        *small_detector(base),
        *("VIRTEX.DATASETS", repr(_data_sets(shapes_world))),
        *("DATASETS.TRAIN", "('world_train',)", "DATASETS.TEST", "('world_test',)"),
        *("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 4),
        *("INPUT.MIN_SIZE_TRAIN", "(48,64,80)", "DATALOADER.NUM_WORKERS", workers),
        *more,
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(options, whole, processes)

    moment = random.Random(f"{SEED} {name}")
    _kill_after(options, killed, processes, moment.choice((1, 3, 5, 7)), 0.4 * moment.random())
    assert (killed / "last_checkpoint").exists()
    assert not (killed / "model_final.pth").exists()
    _finish(["--resume", *options], killed, processes)
    expected, found = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, killed)
    )
    assert len(expected["model"]) > 100
    assert list(differences(expected, found)) == []
    for path in (*whole.glob("*.pth"), *killed.glob("*.pth")):
        path.unlink()  # they take much space


def _data_sets(world: Path) -> list[list[str]]:
    return [
        [f"world_{split}", "coco", str(world / f"annotations/instances_{split}.json")]
        + [str(world / "images" / split)]
        for split in ("train", "test")
    ]


def _start(options: list, output: Path, processes: int) -> Process:
    command = [*python(processes), ROOT / "tools" / "train_net.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*map(str, command), "OUTPUT_DIR", str(output)]
    return shared_server().start(command[1:], environment, output.with_suffix(".log"))


def _finish(options: list, output: Path, processes: int) -> None:
    code = _start(options, output, processes).wait(400)
    assert code == 0, output.with_suffix(".log").read_text()[-2000:]


def _kill_after(
    options: list, output: Path, processes: int, iteration: int, seconds: float
) -> None:
    """Kill -9 so long after the checkpoint of an iteration is there."""
    process = _start(options, output, processes)
    deadline = time.monotonic() + 300
    checkpoint = output / f"model_{iteration:07d}.pth"
    while not checkpoint.exists() or not (output / "last_checkpoint").exists():
        assert not process.poll(), output.with_suffix(".log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds)
    kill_tree(process.pid)
    process.wait()
