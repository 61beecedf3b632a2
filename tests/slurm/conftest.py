"""A Slurm for the session, and jobs on it by way of tools/launch_slurm.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_slurm_programs
from virtex_d2.slurm.submit import RECORD, Submitted, find_submitted

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "launch_slurm.py"
STAND_IN = Path(__file__).with_name("stand_in.py")


@dataclass(frozen=True)
class Launched:
    """A job that was submitted by the tool."""

    submitted: Submitted
    cluster: Cluster

    def log(self, number: str = "") -> str:
        path = self.submitted.path(number)
        return path.read_text(errors="replace") if path.is_file() else ""

    def await_log(self, text: str, count: int = 1, timeout: float = 600) -> None:
        """Wait until the log has a text so many times."""

        def says() -> bool:
            return self.log().count(text) >= count

        self.await_true(says, f"no {count} x '{text}'", timeout)

    def await_end(self, timeout: float = 600) -> str:
        """Wait until the job has ended for good; returns Slurm's word for how."""
        live = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING")
        self.await_true(lambda: self.state not in live, "it does not end", timeout)
        return self.state

    @property
    def state(self) -> str:
        return self.cluster.show(self.submitted.job_id)["JobState"]

    def starts(self, folder: Path) -> list[dict]:
        """What every start of the stand-in has left in its folder."""
        return [json.loads(path.read_text()) for path in sorted(folder.glob("start*.json"))]

    def await_true(self, condition: Callable, problem: str, timeout: float = 600) -> None:
        """Wait for a condition; where it does not come true, the job's log is shown."""
        try:
            self.cluster.until(condition, problem, timeout)
        except AssertionError as error:
            job = self.cluster.command("scontrol", "show", "job", self.submitted.job_id)
            raise AssertionError(f"{error}\n{job}\n{self.log()[-4000:]}") from None


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """Started once; its end asserts that none of its processes is left."""
    if missing := missing_slurm_programs():  # REQUIRE_SLURM=1 has ended the tests before
        pytest.skip(f"no Slurm: {', '.join(missing)} not found")
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster, monkeypatch) -> Iterator[Cluster]:
    """The cluster with both nodes idle, also for Slurm's commands in this process."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, running_cluster.env[name])
    yield running_cluster
    running_cluster.cancel_all()


@pytest.fixture
def tool(cluster, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`tool(*arguments)` runs tools/launch_slurm.py in `tmp_path`, without a site's file."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess:
        return run_tool(cluster, tmp_path, *arguments, **env)

    return run


@pytest.fixture
def launch(cluster, tmp_path) -> Callable[..., Launched]:
    """`launch(*arguments)` submits a job on one CPU task of one node, if they say nothing else."""

    def run(*arguments: object, **env: str) -> Launched:
        return launch_job(cluster, tmp_path, *arguments, **env)

    return run


@pytest.fixture
def high_priority_job(cluster) -> Callable[[], str]:
    """Submits a job for both nodes that preempts what runs there; returns its id."""

    def submit() -> str:
        options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        return cluster.command("sbatch", "--parsable", *options, "--wrap=sleep 1").strip()

    return submit


def run_tool(
    cluster: Cluster, cwd: Path, *arguments: object, **env: str
) -> subprocess.CompletedProcess:
    """Run tools/launch_slurm.py, without a site's file."""
    own = {"XDG_CONFIG_HOME": str(cwd / "no"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        cwd=cwd,
        env={**cluster.env, **own, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def launch_job(cluster: Cluster, cwd: Path, *arguments: object, **env: str) -> Launched:
    """Submit a job by the tool, with its logs in `cwd`."""
    before = set((cwd / "logs").glob(f"*/{RECORD}"))
    done = run_tool(cluster, cwd, "--gpus-per-node=0", "--logs", cwd / "logs", *arguments, **env)
    assert done.returncode == 0, done.stderr
    new = set((cwd / "logs").glob(f"*/{RECORD}")) - before
    return Launched(find_submitted(cwd / "logs", [str(new.pop().parent)])[0], cluster)
