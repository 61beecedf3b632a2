"""The tool on a real Slurm: what it refuses, pipelines, following and the states of jobs."""

import dataclasses
import re

import pytest

from tests.slurm.conftest import STAND_IN
from virtex_d2.slurm.follow import follow, job_states
from virtex_d2.slurm.submit import find_submitted

PIPELINE = """
gpus_per_node = 0
[stages.first]
command = '''{stand_in} "{folder}/first" {length}'''
[stages.second]
after = ["first"]
command = '''{stand_in} "{folder}/second" 2 {more}'''
[stages.third]
after = ["second"]
array = "1-2"
command = '''{stand_in} "{folder}/third{{array}}" 2'''
"""


@pytest.fixture
def pipeline(tmp_path):
    def write(length: int = 2, more: str = ""):
        path = tmp_path / "line.toml"
        values = {"stand_in": STAND_IN, "folder": tmp_path, "length": length, "more": more}
        path.write_text(PIPELINE.format(**values))
        return path

    return write


def test_a_dry_run_prints_the_scripts_and_leaves_nothing(tool, pipeline, tmp_path, cluster):
    done = tool("--pipeline", pipeline(), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 3
    assert "third/job.sbatch, after second\n#!/bin/bash" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["line.toml"]
    assert cluster.squeue("%i") == []


def test_stages_wait_for_one_another_also_through_a_requeue(
    tool, pipeline, tmp_path, cluster, capsys, monkeypatch
):
    monkeypatch.setattr("virtex_d2.slurm.follow._LOOK", 0.05)
    monkeypatch.setattr("virtex_d2.slurm.follow._ASK", 0.2)
    done = tool("--pipeline", pipeline(length=30))
    assert done.returncode == 0, done.stderr
    first, second, third = find_submitted(tmp_path / "output" / "slurm", [])
    cluster.until((tmp_path / "first" / "start0.json").exists, "the first stage does not start")
    cluster.command("scancel", "--signal=USR1", first.job_id)
    assert follow([first, second, third])
    told = capsys.readouterr().out
    assert f"-- second {second.job_id}: PENDING (Dependency)" in told
    assert f"{first.job_id} | == [" in told
    requeued, begun = told.index(": requeued"), told.index(f"{second.job_id} | rank 0")
    assert requeued < begun < told.index(f"{third.job_id}_2 | rank 0 of 1 starts")
    for name in ("second", "third1", "third2"):
        assert (tmp_path / name / "count.txt").read_text() == "2"
    table = tool("--status").stdout
    assert [line.split()[1] for line in table.splitlines()[1:]] == [
        *("first", "second", "third", "third")
    ]
    assert table.count("COMPLETED") == 4


def test_after_a_stage_that_fails_no_other_starts(tool, pipeline, tmp_path, cluster):
    done = tool("--pipeline", pipeline(more="--fail 0"), "--follow")
    assert done.returncode == 1, done.stderr
    _, second, third = find_submitted(tmp_path / "output" / "slurm", [])
    states = [cluster.show(job.job_id)["JobState"] for job in (second, third)]
    assert states == ["FAILED", "CANCELLED"]
    assert "fails on purpose" in done.stdout
    assert not (tmp_path / "third1").exists()


def test_of_a_pipeline_that_slurm_refuses_in_part_nothing_is_left(
    tool, pipeline, tmp_path, cluster
):
    path = pipeline(length=1000)
    path.write_text(path.read_text().replace("[stages.third]", "[stages.third]\npartition='no'"))
    done = tool("--pipeline", path)
    assert done.returncode == 2
    assert "error: sbatch refuses " in done.stderr
    assert "invalid partition specified: no" in done.stderr
    assert "Cancelled again: first, second." in done.stderr
    cluster.until(lambda: not cluster.squeue("%i"), "jobs are left")
    assert not (tmp_path / "second").exists()


def test_a_job_is_followed_to_its_end_by_its_id(launch, tool, tmp_path):
    job = launch("--", STAND_IN, tmp_path / "run", 60)
    job.await_log("starts at 0")
    done = tool("--logs", tmp_path / "logs", "--follow", job.submitted.job_id)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"-- stand_in {job.submitted.job_id}: RUNNING on ")
    assert lines.count("rank 0 finished") == 1
    assert lines[-1].startswith(f"-- stand_in {job.submitted.job_id}: COMPLETED on ")


def test_of_a_job_that_slurm_has_forgotten_its_own_record_tells(launch, tmp_path, capsys):
    job = launch("--", STAND_IN, tmp_path / "run", 1)
    job.await_end()
    forgotten = dataclasses.replace(job.submitted, job_id="999999999")
    (state,) = job_states(forgotten)
    assert str(state) == "FORGOTTEN (finished)"
    assert follow([forgotten])
    assert "rank 0 finished" in capsys.readouterr().out.splitlines()


def test_the_users_defaults_for_sbatch_hold_where_nothing_else_is_said(launch, tmp_path):
    leaked = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SBATCH_PARTITION": "high"}
    job = launch("--", STAND_IN, tmp_path / "one", 1, **leaked)
    assert job.cluster.show(job.submitted.job_id)["Partition"] == "high"
    assert job.await_end() == "COMPLETED", job.log()
    job = launch("--partition", "main", "--", STAND_IN, tmp_path / "two", 1, **leaked)
    assert job.cluster.show(job.submitted.job_id)["Partition"] == "main"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do"),
        (("--pipeline", "x.toml", "--", "y.py"), "--pipeline: its file has the commands"),
        (("--status", "--", "y.py"), "not together with a new job"),
        (("--status", "77"), "77: neither a folder with a submitted job, nor a job of "),
        (("--follow",), "no job was submitted from here"),
        (("--gpus-per-node", "0", "--", "tools/none.py"), "tools/none.py: no such file in "),
        (("--gpus-per-node", "0", "--", "sleep", "1"), "--logs .*: .*directory"),
    ],
)
def test_a_mistake_ends_with_one_line(tool, tmp_path, arguments, message):
    if "sleep" in arguments:
        (tmp_path / "output").write_text("a file where the folder of logs should be")
    done = tool(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(f"^error: .*{message}", line)


def test_without_slurm_the_tool_says_where_to_run_it(tool):
    done = tool("--gpus-per-node", 0, "--", "sleep", 1, PATH="/nowhere")
    assert done.returncode == 2
    assert "error: sbatch: not found. Run this on a machine of a cluster" in done.stderr
