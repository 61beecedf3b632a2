"""The tool and sbatch, without a cluster: what is said, and what is left behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from virtex_d2.runtime.errors import InputError
from virtex_d2.slurm.command import read_command
from virtex_d2.slurm.options import JobOptions
from virtex_d2.slurm.script import Job
from virtex_d2.slurm.submit import submit

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

    def write(text: str) -> None:
        (tmp_path / "bin").mkdir()
        path = tmp_path / "bin" / "sbatch"
        path.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
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
