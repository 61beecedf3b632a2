"""What 2 nodes with 2 processes each see of the data, on a real Slurm."""

import json

import pytest

from tests.e2e.captioned_world import THIN, write_world
from tests.e2e.recording import PRETRAIN, recorder, run, samples, seen

pytestmark = pytest.mark.slow

ITERATIONS, CHANGE = 6, 4


def test_four_processes_on_two_nodes_see_what_one_sees_and_one_goes_on(launch, tmp_path):
    world = tmp_path / "world"
    write_world(world, 24)
    options = {
        **THIN,
        "DATA.NUM_WORKERS": 1,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.CNN_LR": 0.01,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SEED": 1,
        **json.loads((world / "coco.options.json").read_text()),
        "DATA.VAL_CAPTIONS": "",
    }
    pairs = [part for pair in options.items() for part in pair]
    alone = run(PRETRAIN, pairs, tmp_path / "alone", 1, ITERATIONS)

    shared = tmp_path / "shared"
    command = recorder(PRETRAIN, pairs, shared)
    whole = ("--nodes", 2, "--tasks-per-node", 2, "--env", f"STOP_AFTER={CHANGE}")
    job = launch(*whole, "--", *command)
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert len(list(shared.glob("seen-*.jsonl"))) == 4
    by_four = seen(shared)
    assert [line["iteration"] for line in by_four] == list(range(CHANGE))
    assert samples(by_four) == samples(alone)[:CHANGE]

    by_one = run(PRETRAIN, pairs, shared, 1, ITERATIONS)
    assert samples(by_one) == samples(alone)[CHANGE:]
    assert len({sample for line in alone for sample in line["samples"]}) == 8 * ITERATIONS
