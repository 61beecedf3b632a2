"""The tool and sbatch, without a cluster: what is said, and what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.slurm.command import read_command
from virtex_d2.slurm.follow import job_states
from virtex_d2.slurm.options import JobOptions
from virtex_d2.slurm.script import Job
from virtex_d2.slurm.submit import SlurmError, Submitted, find_submitted, submit

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "launch_slurm.py"
# What sbatch says on a machine that has the package and no cluster, and where that is down.
NO_CONFIG = "sbatch: fatal: Could not establish a configuration source"
NO_CONTROLLER = "sbatch: error: Batch job submission failed: Unable to contact slurm controller"
REFUSED = "sbatch: error: invalid partition specified: no"
LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"]))
    command = read_command(["sleep", "1"], tmp_path, ROOT)
    folder = tmp_path / "output" / "slurm" / "mine"
    return Job(JobOptions(gpus_per_node="0"), command, folder, tmp_path, ROOT)


@pytest.fixture
def sbatch(tmp_path):
    """`sbatch(text)`: a program of that name that says so and fails."""

    def write(text: str, code: int = 1) -> None:
        (tmp_path / "bin").mkdir()
        path = tmp_path / "bin" / "sbatch"
        stream = "" if code == 0 else ">&2"
        path.write_text(f"#!/bin/sh\necho '{text}' {stream}\nexit {code}\n")
        path.chmod(0o755)

    return write


@pytest.mark.parametrize("said", [NO_CONFIG, NO_CONTROLLER])
def test_where_there_is_no_cluster_that_is_said_and_nothing_is_left(job, sbatch, said, tmp_path):
    sbatch(said)
    with pytest.raises(InputError, match=f"{said}\n.*where sinfo answers; --dry-run") as error:
        submit(job)
    assert str(error.value).startswith("sbatch refuses the job sleep:")
    assert not (tmp_path / "output").exists()


def test_without_sbatch_that_is_said_and_nothing_is_left(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="sbatch: not found. Run this on a machine of a cluster"):
        submit(job)
    assert not (tmp_path / "output").exists()


def test_a_refused_job_leaves_the_other_jobs_alone(job, sbatch, tmp_path):
    sbatch(REFUSED)
    other = tmp_path / "output" / "slurm" / "other"
    other.mkdir(parents=True)
    with pytest.raises(InputError, match="invalid partition specified: no$"):
        submit(job)
    assert list((tmp_path / "output" / "slurm").iterdir()) == [other]


def test_of_a_job_that_may_have_been_submitted_the_script_stays(job, sbatch):
    sbatch(LOST)
    with pytest.raises(
        InputError, match="The job may have been submitted: look at squeue"
    ) as error:
        submit(job)
    script = job.folder / "job.sbatch"
    assert script.is_file()
    assert str(script) in str(error.value)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("4711", "4711"),
        ("4711;delta", "4711"),
        ("Welcome to cluster Delta3\n--> account: ok\n4711", "4711"),
        ("2026\nYou have 3 jobs\n4711;delta\nGood luck", "4711"),
        ("  4711  \n", "4711"),
    ],
)
def test_the_jobs_number_is_told_from_what_else_sbatch_prints(job, sbatch, answer, number):
    sbatch(answer, code=0)
    submitted = submit(job)
    assert submitted.job_id == number
    assert find_submitted(job.folder.parent, []) == [submitted]


@pytest.mark.parametrize("answer", ["", "Submitted batch job 4711", "Welcome", "4711.delta"])
def test_an_answer_without_a_number_may_be_of_a_job(job, sbatch, answer):
    sbatch(answer, code=0)
    with pytest.raises(
        InputError, match="(?s)without a job.s number:.*may have been submitted"
    ) as e:
        submit(job)
    assert answer in str(e.value)
    assert (job.folder / "job.sbatch").is_file()


@pytest.mark.parametrize("job_id", ["Welcome\n4711", "", None, [1], "4711;delta"])
def test_a_record_of_another_kind_is_named(tmp_path, job_id):
    (tmp_path / "x").mkdir()
    record = {"job_id": job_id, "name": "x", "log": "log.txt"}
    (tmp_path / "x" / "job.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="job.json: no record of a job"):
        find_submitted(tmp_path, [])


SHOWN = "JobId=4711 JobName=x JobState=RUNNING Restarts=0 RunTime=1 TimeLimit=2 NodeList=n1"


@pytest.mark.parametrize("banner", ["", "Welcome\n", "--> ok\nx=y\n\n"])
def test_states_are_told_from_what_else_scontrol_prints(tmp_path, monkeypatch, banner):
    monkeypatch.setattr("virtex_d2.slurm.follow.slurm", lambda *_: f"{banner}{SHOWN}\nBye\n")
    (state,) = job_states(Submitted("4711", "x", tmp_path, "log.txt"))
    assert (state.job_id, state.name) == ("4711", "RUNNING")
    monkeypatch.setattr("virtex_d2.slurm.follow.slurm", lambda *_: banner)
    with pytest.raises(SlurmError, match="does not tell the state of job 4711"):
        job_states(Submitted("4711", "x", tmp_path, "log.txt"))


def _start(cwd: Path, *words: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(cwd)}
    pipe = subprocess.PIPE
    command = [sys.executable, str(TOOL), *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def test_a_reader_that_has_seen_enough_ends_a_dry_run_without_a_word(tmp_path):
    """As in `| head`."""
    many = ["argument"] * 20000  # more than a pipe holds
    process = _start(tmp_path, "--dry-run", "--gpus-per-node=0", "--", "echo", *many)
    assert process.stdout.readline().startswith("# ")
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tools/train_net.py", "--config-file", "x"), "expected -- before the command: .* -- t"),
        (("--gpus-per-node=8", "tools/demo.py"), "expected -- before the command"),
        (("--nodse", "2"), r"unrecognized arguments: --nodse \(is -- missing"),
        (("--nodse=2", "--", "x.py"), r"unrecognized arguments: --nodse=2$"),
    ],
)
def test_a_forgotten_separator_is_named(tmp_path, words, message):
    process = _start(tmp_path, *words)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(message, errors.strip()), errors
