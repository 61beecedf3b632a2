"""Pretraining that is killed at random moments ends as if it had not been: bit-identical weights.

    pytest tests/e2e/test_kill_and_resume.py -s

prints the table of all cases. KILL_SEED changes the moments, KILLS how often each run is killed.
"""

import json
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.e2e.captioned_world import THIN, THIN_TOOL, write_world
from tests.e2e.forked_runs import Process, shared_server
from tests.e2e.killing import differences, kill_tree
from tests.processes import python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("KILL_SEED", "1"))
ITERATIONS = 18
KILLS = int(os.environ.get("KILLS", "1"))  # of each case


@dataclass(frozen=True)
class Case:
    """A run: its task, the format of its data, its loader workers and its processes."""

    task: str
    data: str
    workers: int
    processes: int
    more: tuple = field(default=())

    def __str__(self) -> str:
        return f"{self.task}-{self.data}-{self.workers}w-{self.processes}p"


MIXES = (
    *("MODEL.CAPTIONING.PARALLEL_SHARE", 0.5),
    *("MODEL.CAPTIONING.CLASSIFICATION_WEIGHT", 0.5),
    *("MODEL.CAPTIONING.LABEL_SMOOTHING", 0.1),
)
IPT = (
    *("IPT.FEATURES", 4, "IPT.PATCH_SIZE", 12, "IPT.LAYERS", 1, "IPT.HEADS", 2),
    *("SOLVER.OPTIMIZER", "adamw", "SOLVER.CNN_LR", 0.002, "DATA.IMAGE_SIZE", 224),
)
CASES = [
    Case("bicaptioning", "coco", 0, 1),
    Case("masked_lm", "tsv", 1, 1),
    Case("token_classification", "folder", 3, 1),
    Case("multilabel_classification", "coco", 1, 1),
    Case("captioning", "webdataset", 3, 1),
    Case("bicaptioning", "pipe", 1, 1),
    Case("bicaptioning", "mixed", 0, 2, MIXES),
    Case("masked_lm", "pipe", 3, 2),
    Case("backward_captioning", "karpathy", 1, 2),
    Case("bicaptioning", "coco", 3, 2, ("SOLVER.OPTIMIZER", "adamw", "DATA.FRACTION", 0.5)),
    Case("ipt", "images", 1, 2, IPT),
    Case("seqclr", "words", 1, 1),
]
TABLE: list[str] = []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 24)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _print_table():
    yield
    print("\n| case | killed in iteration | resumed from | final weights |\n|---|---|---|---|")
    print("\n".join(TABLE))


def command(case: Case, world: Path, output: Path, *flags: str) -> list[str]:
    options = {
        "OUTPUT_DIR": output,
        **THIN,
        "MODEL.OBJECTIVE": case.task,
        "DATA.NUM_WORKERS": case.workers,
        "DATA.STREAM_BLOCK": 3,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.CNN_LR": 0.01,  # the paper's rate makes batches of four diverge
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "TEST.EVAL_PERIOD": 8,
        "TEST.IMS_PER_BATCH": 8,
        "TEST.BEST_METRIC": "val/loss",
        "LOG_PERIOD": 1,
        **json.loads((world / f"{case.data}.options.json").read_text()),
    }
    pairs = [str(part) for pair in options.items() for part in pair]
    return [*python(case.processes), str(THIN_TOOL), *flags, *pairs, *map(str, case.more)]


def start(arguments: list[str], log: Path) -> Process:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return shared_server().start(arguments[1:], environment, log)


def iterations_seen(output: Path) -> list[int]:
    try:
        lines = (output / "metrics.json").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    # a kill may leave the last line unfinished
    return [json.loads(line)["iteration"] for line in lines if line.endswith("\n")]


def kill_in_iteration(arguments: list[str], output: Path, iteration: int, delay: float) -> None:
    """Start the run and kill -9 all of it, `delay` seconds after that iteration was logged."""
    seen = len(iterations_seen(output))
    process = start(arguments, output.with_suffix(".log"))
    deadline = time.monotonic() + 200
    while not any(done >= iteration for done in iterations_seen(output)[seen:]):
        assert not process.poll(), output.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.02)
    time.sleep(delay)
    kill_tree(process.pid)
    process.wait()


def finish(arguments: list[str], output: Path) -> None:
    log = output.with_suffix(".log")
    assert start(arguments, log).wait(timeout=300) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_is_killed_ends_with_the_weights_of_one_that_is_not(case, world, tmp_path):
    rng = random.Random(f"{SEED} {case}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = threading.Thread(target=finish, args=(command(case, world, whole), whole))
    undisturbed.start()  # beside the other: two cores

    moments = sorted(rng.sample(range(4, ITERATIONS - 4), KILLS))
    resumed = command(case, world, killed, "--resume")
    for moment in moments:
        kill_in_iteration(resumed, killed, moment, rng.uniform(0, 0.05))
        assert not (killed / "model_final.pth").exists(), "the run ended before it was killed"
    finish(resumed, killed)
    undisturbed.join()

    one, other = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, killed)
    )
    differing = list(differences(one, other))
    log = (killed / "log.txt").read_text()
    places = [line.split()[-1].rstrip(".") for line in log.splitlines() if "Resumed after" in line]
    TABLE.append(
        f"| {case} | {', '.join(map(str, moments))} | {', '.join(places) or 'start'} | "
        f"{'identical' if not differing else 'DIFFERENT'} |"
    )
    assert not differing, differing[:10]
    assert validations(whole) == validations(killed)
    assert len(validations(whole)) >= 3
    best = [torch.load(f / "model_best.pth", weights_only=True) for f in (whole, killed)]
    assert not list(differences(best[0]["model"], best[1]["model"]))
    for folder in (whole, killed):
        shutil.rmtree(folder)


def validations(output: Path) -> dict[tuple[int, str], float]:
    """What was logged last of each validation. (Training losses are smoothed over iterations.)"""
    lines = (output / "metrics.json").read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in lines if line.endswith("\n")]
    return {
        (line["iteration"], key): value
        for line in lines
        for key, value in line.items()
        if key.startswith("val/")
    }
