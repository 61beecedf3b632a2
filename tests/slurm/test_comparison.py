"""tools/compare_inits.py as a job array on a real Slurm: a job for each run, and one report."""

import csv
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comparison(shapes_world, small_detector, backbone_file, tmp_path):
    """The command that compares two starts of a thin detector, with one seed."""
    _, config, *opts = small_detector("FPN")
    pairs = dict(zip(opts[::2], opts[1::2], strict=True))
    pairs.pop("SEED")  # is the comparison's
    data = [
        [f"array_{split}", "coco", str(shapes_world / f"annotations/instances_{split}.json")]
        + [str(shapes_world / "images" / split)]
        for split in ("train", "test")
    ]
    pairs |= {
        "VIRTEX.DATASETS": repr(data),
        "DATASETS.TRAIN": "('array_train',)",
        "DATASETS.TEST": "('array_test',)",
        "SOLVER.MAX_ITER": 20,
        "SOLVER.CHECKPOINT_PERIOD": 5,
    }
    command = [ROOT / "tools" / "compare_inits.py", "--output", tmp_path / "comparison"]
    command += ["--config-file", config, "--seeds", 1]
    command += ["--init", "random", "--init", f"other={backbone_file('resnet18')}"]
    return command, ["--opts", *(word for pair in pairs.items() for word in pair)]


def test_an_arrays_jobs_make_the_runs_and_one_that_is_stopped_goes_on(
    comparison, launch, cluster, run_python, tmp_path
):
    command, opts = comparison
    job = launch("--array", "0-1", "--", *command, "--only", "{array}", *opts)
    first, second = (f"{job.submitted.job_id}_{number}" for number in (0, 1))
    runs = tmp_path / "comparison" / "runs"
    begun = "**/random/seed1/last_checkpoint"
    job.await_true(lambda: list(runs.glob(begun)), "no checkpoint of the first run")
    cluster.command("scancel", "--signal=USR1", first)

    def ended() -> bool:
        return all(
            cluster.show(one)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED")
            for one in (first, second)
        )

    job.await_true(ended, "the array does not end")
    logs = job.log("0") + job.log("1")
    assert [cluster.show(one)["JobState"] for one in (first, second)] == ["COMPLETED"] * 2, logs
    assert ": requeued" in job.log("0")
    (log,) = runs.glob("**/random/seed1/log.txt")
    (iteration,) = re.findall(r"Stopped unfinished at iteration (\d+) of 20", log.read_text())
    assert re.findall(r"Starting training from iteration (\d+)", log.read_text()) == [
        "0",
        iteration,
    ]

    report = run_python(*command, "--report-only", *opts, cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert (tmp_path / "comparison" / "report.html").is_file()
    with open(tmp_path / "comparison" / "summary.csv", newline="") as file:
        assert {row["init"] for row in csv.DictReader(file)} == {"random", "other"}
