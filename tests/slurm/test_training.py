"""Real tools on a real Slurm: 2 nodes with 2 processes each, struck in the ways that jobs are.

However a job was struck, it ends with the weights of one that was not, bit for bit.
"""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.e2e.captioned_world import THIN, THIN_TOOL, write_world
from tests.e2e.killing import differences
from tests.slurm.conftest import launch_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ("--nodes", 2, "--tasks-per-node", 2)
ITERATIONS = 30  # quick ones: a blow must come before the last


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """`pretraining(folder)` -> the command that pretrains a thin model, two samples a process.

    `tool` is another one than that with a thin network.
    """
    world = tmp_path_factory.mktemp("captioned")
    write_world(world, 24)
    options = {
        **THIN,
        "DATA.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.CNN_LR": 0.01,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 5,
        "LOG_PERIOD": 1,
        "SEED": 1,
        **json.loads((world / "coco.options.json").read_text()),
    }
    pairs = [str(part) for pair in options.items() for part in pair]

    def command(folder: Path, *more: object, tool: Path = THIN_TOOL) -> list[str]:
        return [str(tool), *pairs, "OUTPUT_DIR", str(folder), *map(str, more)]

    return command


@pytest.fixture(scope="module")
def detection(shapes_world, small_detector):
    """`detection(folder)` -> the command that trains a thin detector, an image a process.

    `kind` is another of `small_detector`.
    """
    data = [
        [f"slurm_{split}", "coco", str(shapes_world / f"annotations/instances_{split}.json")]
        + [str(shapes_world / "images" / split)]
        for split in ("train", "test")
    ]
    options = {
        "VIRTEX.DATASETS": data,
        "DATASETS.TRAIN": "('slurm_train',)",
        "DATASETS.TEST": "('slurm_test',)",
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": ITERATIONS + 10,  # Slurm looks for what to preempt every second
        "SOLVER.CHECKPOINT_PERIOD": 5,
    }
    pairs = [str(part) for pair in options.items() for part in pair]

    def command(folder: Path, *more: object, kind: str = "thin FPN") -> list[str]:
        tool = str(ROOT / "tools" / "train_net.py")
        return [tool, *small_detector(kind), *pairs, "OUTPUT_DIR", str(folder), *map(str, more)]

    return command


@pytest.fixture(scope="module")
def pretrained(running_cluster, pretraining, tmp_path_factory) -> Path:
    """The folder of a pretraining that nothing has disturbed."""
    return _undisturbed(running_cluster, pretraining, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def trained(running_cluster, detection, tmp_path_factory) -> Path:
    """The folder of a detector's training that nothing has disturbed."""
    return _undisturbed(running_cluster, detection, tmp_path_factory.mktemp("trained"))


def _undisturbed(cluster, command, cwd: Path) -> Path:
    job = launch_job(cluster, cwd, *WHOLE, "--", *command(cwd / "run"))
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert ": requeued" not in job.log()
    return cwd / "run"


def _assert_same(folder: Path, reference: Path) -> None:
    found, expected = (
        torch.load(path / "model_final.pth", weights_only=True) for path in (folder, reference)
    )
    assert len(expected["model"]) > 50
    assert list(differences(found, expected)) == []


def _reached(folder: Path, iteration: int):
    """A condition: the run has logged that iteration, since the file's last line."""

    def seen() -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (folder / "metrics.json").read_text().splitlines()
            return json.loads(lines[-1])["iteration"] >= iteration
        return False

    return seen


def _rank_process(cluster, rank: int) -> int:
    """The process of a rank: the task itself, and not what it has started."""
    tasks = cluster.processes(f"SLURM_PROCID={rank}")
    return next(pid for pid in tasks if b"pretrain_net.py" in _cmdline(pid))


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_pretraining_and_fine_tuning_run_on_two_nodes(pretrained, trained, running_cluster):
    for folder in (pretrained, trained):
        assert (folder / "model_final.pth").is_file()
        for node in running_cluster.nodes:
            assert node in (folder / "log.txt").read_text()


def test_a_run_that_is_requeued_twice_ends_as_if_it_had_not_been(
    launch, cluster, pretraining, pretrained, tmp_path
):
    job = launch(*WHOLE, "--", *pretraining(tmp_path / "run"))
    for requeues, iteration in enumerate((2, 9), start=1):
        job.await_true(_reached(tmp_path / "run", iteration), f"no iteration {iteration}")
        cluster.command("scancel", "--signal=USR1", job.submitted.job_id)
        job.await_log(": requeued", requeues)
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert cluster.show(job.submitted.job_id)["Restarts"] == "2"
    _assert_same(tmp_path / "run", pretrained)


def test_a_detector_preempted_by_a_higher_partition_goes_on_when_that_is_done(
    launch, cluster, detection, trained, tmp_path, high_priority_job
):
    job = launch(*WHOLE, "--", *detection(tmp_path / "run"))
    job.await_true((tmp_path / "run" / "last_checkpoint").is_file, "no checkpoint")
    higher = high_priority_job()
    job.await_log("Slurm sent USR1")
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert ": requeued" in job.log()
    assert cluster.show(higher)["JobState"] == "COMPLETED"
    _assert_same(tmp_path / "run", trained)


def test_a_run_that_loses_a_node_goes_on_from_its_last_checkpoint(
    launch, cluster, pretraining, pretrained, tmp_path
):
    job = launch(*WHOLE, "--", *pretraining(tmp_path / "run"))
    job.await_true(_reached(tmp_path / "run", 7), "no iteration 7")
    cluster.crash_node(cluster.nodes[1])
    job.await_true(lambda: job.state == "PENDING", "Slurm does not requeue it")
    cluster.start_node(cluster.nodes[1])
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert "Resumed after iteration" in (tmp_path / "run" / "log.txt").read_text()
    _assert_same(tmp_path / "run", pretrained)


def test_torchrun_in_a_job_is_stopped_and_goes_on_too(
    launch, cluster, pretraining, pretrained, tmp_path
):
    job = launch(*WHOLE, "--launcher", "torchrun", "--", *pretraining(tmp_path / "run"))
    job.await_true(_reached(tmp_path / "run", 2), "no iteration 2")
    cluster.command("scancel", "--signal=USR1", "--batch", job.submitted.job_id)
    assert job.await_end() == "COMPLETED", job.log()[-4000:]
    assert job.log().count(": requeued") == 1
    _assert_same(tmp_path / "run", pretrained)


def test_a_process_that_is_killed_ends_the_job_and_is_named(launch, cluster, pretraining, tmp_path):
    job = launch(*WHOLE, "--", *pretraining(tmp_path / "run"))
    job.await_true(_reached(tmp_path / "run", 2), "no iteration 2")
    os.kill(_rank_process(cluster, 3), signal.SIGKILL)
    assert job.await_end() == "FAILED"
    assert "failed with exit code" in job.log()
    assert ": requeued" not in job.log()
    assert "task 3: Killed" in job.log()


def test_from_captions_to_three_detectors_is_one_pipeline(tool, pretraining, detection, tmp_path):
    pretrained, exported = tmp_path / "pretrained", tmp_path / "exported.pkl"
    backbone = pretrained / "backbone.safetensors"
    few = ("SOLVER.MAX_ITER", 4)
    stages = {
        "pretrain": ([], pretraining(pretrained, *few, tool=ROOT / "tools" / "pretrain_net.py")),
        "export": (
            ["pretrain"],
            [ROOT / "tools" / "convert_checkpoint.py", backbone, exported]
            + ["--to", "detectron2", "--verify"],
        ),
        "finetune": (
            ["pretrain", "export"],
            detection(
                *(tmp_path / "seed{array}", *few, "SEED", "{array}", "MODEL.WEIGHTS", backbone),
                kind="FPN",
            ),
        ),
    }
    lines = ["gpus_per_node = 0"]
    for name, (after, command) in stages.items():
        lines += [f"[stages.{name}]", f"after = {json.dumps(after)}"]
        lines += [f"command = {json.dumps([str(word) for word in command])}"]
    lines += ['array = "1-3"']  # of the last stage
    (tmp_path / "line.toml").write_text("\n".join(lines))
    done = tool("--pipeline", tmp_path / "line.toml", "--follow")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert exported.is_file()
    heads = []
    for seed in (1, 2, 3):
        folder = tmp_path / f"seed{seed}"
        report = json.loads((folder / "transfer_report.json").read_text())
        assert report["source"] == str(backbone)
        model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
        heads.append(model["roi_heads.box_predictor.cls_score.weight"])
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
