"""The batch script on a real Slurm, around a program that stands in for a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import STAND_IN, Launched, launch_job

WHOLE = ("--nodes", 2, "--tasks-per-node", 2)
PATIENCE = 600  # seconds


@dataclass
class Struck:
    """A job on one processor, and what is done to it when.

    Attributes:
        job: what was submitted.
        folder: the stand-in's.
        strikes: conditions, each with what is done when it has come true, in order.
        number: of an array's job.
    """

    job: Launched
    folder: Path
    strikes: list[tuple[Callable[[], bool], Callable[[], object]]]
    number: str = ""

    @property
    def id(self) -> str:
        return self.job.submitted.job_id + (self.number and f"_{self.number}")

    @property
    def log(self) -> str:
        return self.job.log(self.number)

    @property
    def end(self) -> str:
        return self.job.cluster.show(self.id)["JobState"]

    @property
    def starts(self) -> list[dict]:
        return self.job.starts(self.folder)


@pytest.fixture(scope="module")
def struck(running_cluster, tmp_path_factory) -> dict[str, Struck]:
    """Jobs that ran beside each other, each struck in its own way, and have all ended.

    Together, because Slurm lets a requeued job wait for some seconds, and so do these tests then.
    """
    cwd = tmp_path_factory.mktemp("struck")
    jobs: dict[str, Struck] = {}

    def add(name: str, arguments: tuple, strikes: list[tuple], options: tuple = ()) -> None:
        job = launch_job(running_cluster, cwd, *options, "--", STAND_IN, cwd / name, *arguments)
        jobs[name] = Struck(job, cwd / name, [])
        jobs[name].strikes += [_strike(running_cluster, jobs[name], *one) for one in strikes]

    warn, cancel = ("--signal=USR1",), ()
    # Slurm looks at time limits every 30 seconds, and warns early rather than late.
    limit = ("--time", 1, "--stop-before", 50)
    add("out of time", (1000,), [(": requeued", 1, cancel)], limit)
    add("late", (40, "--late", 1), [("started by", 1, ("--batch", *warn))])
    add("stuck", (40, "--stuck"), [("starts at 0", start, warn) for start in (1, 2, 3)])
    add("told to stop", (1000, "--stop-file"), [("starts at 0", 1, warn)])
    add("cancelled", (1000,), [("starts at 0", 1, cancel)])
    add("array{array}", (40, "SEED", "{array}", "x{array}y"), [], ("--array", "1,3"))
    array = jobs.pop("array{array}").job
    for number in "13":
        jobs[f"array{number}"] = one = Struck(array, cwd / f"array{number}", [], number)
        if number == "3":
            one.strikes.append(_strike(running_cluster, one, "starts at 0", 1, warn))
    _strike_until_all_have_ended(running_cluster, jobs)
    return jobs


def _strike(cluster: Cluster, one: Struck, text: str, count: int, options: tuple) -> tuple:
    return (
        lambda: one.log.count(text) >= count,
        lambda: cluster.command("scancel", *options, one.id),
    )


def _strike_until_all_have_ended(cluster: Cluster, jobs: dict[str, Struck]) -> None:
    deadline = time.monotonic() + PATIENCE
    while cluster.squeue("%i"):
        for one in jobs.values():
            if one.strikes and one.strikes[0][0]():
                one.strikes.pop(0)[1]()
        logs = {name: one.log[-1000:] for name, one in jobs.items()}
        assert time.monotonic() < deadline, f"they do not end: {logs}"
        time.sleep(0.05)


def test_every_process_starts_with_its_place_and_the_log_says_how(launch, tmp_path):
    folder = tmp_path / 'it\'s "a" $run'
    awkward = ["a b", "", "$HOME `id` \\ 'x'", "[['n', 'coco']]", "%j", "--flag=*"]
    job = launch(
        *WHOLE,
        *("--gpus-per-node", 2, "--cpus-per-task", 1, "--env", "MINE=two words", "--name", "first"),
        *("--setup", "export LATER=$UNSET_BEFORE/x", "--", STAND_IN, folder, 2, *awkward),
    )
    assert job.await_end() == "COMPLETED", job.log()
    assert job.cluster.show(job.submitted.job_id)["JobName"] == "first"
    log = job.log()
    for rank in range(4):
        assert f"rank {rank} of 4 starts at " in log
    (start,) = job.starts(folder)
    assert start["argv"] == [str(folder), "2", *awkward]
    env = start["env"]
    assert (env["MINE"], env["LATER"], env["OMP_NUM_THREADS"]) == ("two words", "/x", "1")
    assert env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert f"start 0 on {job.cluster.show(job.submitted.job_id)['NodeList']}, until " in log
    assert "OMP_NUM_THREADS=1\n" in log
    assert "4 tasks on 2 nodes" in log
    assert log.endswith("finished\n")


def test_a_warning_to_the_shell_reaches_a_process_that_did_not_listen_yet(struck):
    late = struck["late"]
    assert late.end == "COMPLETED", late.log
    assert "Slurm sent USR1: asking the run to save a checkpoint and stop" in late.log
    assert late.log.count(": requeued") == 1
    _, second = late.starts
    assert 0 < second["from"] < 40
    assert second["env"]["SLURM_RESTART_COUNT"] == "1"


def test_a_job_is_stopped_before_its_time_is_over_and_requeued(struck):
    log = struck["out of time"].log
    assert "Slurm sent USR1: asking the run to save a checkpoint and stop" in log
    assert "stopped unfinished at" in log
    assert log.count(": requeued") == 1


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(struck):
    stuck = struck["stuck"]
    assert stuck.end == "FAILED", stuck.log
    assert "not requeued: no progress in 2 restarts" in stuck.log
    assert stuck.log.count(": requeued") == 2


def test_a_cancelled_job_is_not_requeued_although_its_run_stopped_unfinished(struck):
    cancelled = struck["cancelled"]
    assert cancelled.end == "CANCELLED", cancelled.log
    assert "not requeued: Slurm ends the job (COMPLETING)" in cancelled.log
    assert len(cancelled.starts) == 1


def test_a_job_whose_run_was_told_to_stop_by_a_file_is_not_requeued(struck):
    told = struck["told to stop"]
    assert told.end == "FAILED", told.log  # exit code 75
    assert "not requeued: the file STOP asked for it" in told.log
    assert len(told.starts) == 1


def test_an_arrays_jobs_have_their_numbers_logs_and_markers(struck):
    first, third = struck["array1"], struck["array3"]
    assert (first.end, third.end) == ("COMPLETED", "COMPLETED"), third.log
    assert (len(first.starts), len(third.starts)) == (1, 2)
    for one in (first, third):
        assert one.starts[0]["argv"][2:] == ["SEED", one.number, f"x{one.number}y"]
    assert ": requeued" not in first.log


def test_a_job_preempted_without_a_grace_period_requeues_itself_where_slurm_would_cancel_it(
    launch, tmp_path, high_priority_job
):
    job = launch("--partition", "cancel", "--", STAND_IN, tmp_path / "run", 40)
    job.await_log("starts at 0")
    high_priority_job()
    assert job.await_end() == "COMPLETED", job.log()
    _, second = job.starts(tmp_path / "run")
    assert second["from"] > 0


def test_a_failing_process_ends_the_others_and_the_job_fails(launch, tmp_path):
    job = launch(*WHOLE, "--", STAND_IN, tmp_path / "run", 1000, "--fail", 2)
    assert job.await_end() == "FAILED"
    assert "rank 2 fails on purpose" in job.log()
    assert "failed with exit code" in job.log()
    assert len(job.starts(tmp_path / "run")) == 1


def test_a_setup_that_fails_ends_the_job_before_the_run(launch, tmp_path):
    job = launch("--module", "no-such-module", "--", STAND_IN, tmp_path / "run", 5)
    assert job.await_end() == "FAILED"
    assert "failed with exit code 127 before the run" in job.log()
    assert not (tmp_path / "run").exists()
