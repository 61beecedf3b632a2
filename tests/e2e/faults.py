"""What befalls a run in `benchmarks/kill_matrix.py`, and when."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.kill_cases import ITERATIONS, Case, Run
from tests.e2e.killing import descendants

UNFINISHED = 75
_PATIENCE = 300.0  # seconds
_BALLAST = "ballast"


class Missed(Exception):  # noqa: N818 - no failure: the run was faster, and the cell is repeated
    """The moment had passed before the fault was there."""


@dataclass(frozen=True)
class Fault:
    """One way to disturb a run.

    Attributes:
        name: for the table.
        strike: (run, case, random numbers) -> time.monotonic() of the blow, or None where the
            moment is the run's own; returns right after it.
        check: (run, case, exit codes) -> None; raises `Missed` where the blow went beside.
    """

    name: str
    strike: Callable[[Run, Case, random.Random], float | None]
    check: Callable[[Run, Case, list[int]], None]


def _until(run: Run, condition: Callable[[], bool], poll: float = 0.01) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if not run.lives:
            raise Missed(f"it had ended: {run.tail()}")
        if time.monotonic() > deadline:
            raise TimeoutError(run.tail())
        time.sleep(poll)


def _until_iteration(run: Run, iteration: int) -> None:
    _until(run, lambda: any(record["iteration"] >= iteration for record in run.records()))


def _at_random_iteration(number: int) -> Callable[[Run, Case, random.Random], float]:
    def strike(run: Run, case: Case, rng: random.Random) -> float:
        _until_iteration(run, rng.randrange(ITERATIONS - 2))
        time.sleep(rng.uniform(0, 0.2))
        return _signal(run, number, rng)

    return strike


def _signal(run: Run, number: int, rng: random.Random) -> float:
    """To all processes and their helpers, as Slurm does; to all ranks, not at once; or to one."""
    ranks = [process.pid for process in run.processes]
    rng.shuffle(ranks)
    kind = rng.choice(("job", "ranks", "one"))
    targets = {
        "job": [pid for rank in ranks for pid in (*descendants(rank), rank)],
        "ranks": ranks,
        "one": ranks[:1],
    }[kind]
    start = time.monotonic()
    for pid in targets:
        if kind == "ranks" and pid != targets[0]:
            time.sleep(rng.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            if number != signal.SIGKILL and rng.random() < 0.5:
                os.kill(pid, number)  # a second one is harmless
    return start


def _was_killed(run: Run, case: Case, codes: list[int]) -> None:
    if not any(codes):
        raise Missed("it had finished")


def _has_stopped(run: Run, case: Case, codes: list[int]) -> None:
    if not any(codes):
        raise Missed("it had finished")
    if set(codes) != {UNFINISHED}:
        raise RuntimeError(f"exit codes {codes}, expected {UNFINISHED}: {run.tail()}")
    if not run.marker.exists():
        raise RuntimeError(f"no marker: {run.tail()}")


def _strike_write(run: Run, case: Case, rng: random.Random) -> float:
    # How many are written before: those of two periods and the last; in pretraining the best too.
    saved = rng.randrange(3)
    _until(run, lambda: run.logged("Saving checkpoint") > saved, poll=0.001)
    _until(run, run.being_written, poll=0.0005)
    time.sleep(rng.uniform(0, 0.004))
    start = time.monotonic()
    for process in run.processes:
        process.send(signal.SIGKILL)
    return start


def _was_writing(run: Run, case: Case, codes: list[int]) -> None:
    if not run.being_written():  # what a killed write leaves behind
        raise Missed("the checkpoint was written")


def _strike_evaluation(run: Run, case: Case, rng: random.Random) -> float:
    begun = rng.randrange(2)
    _until(run, lambda: run.logged(case.begins) > begun, poll=0.002)
    time.sleep(rng.uniform(0, 0.03))
    number = rng.choice((signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL))
    return _signal(run, number, rng)


def _was_evaluating(run: Run, case: Case, codes: list[int]) -> None:
    if run.logged(case.begins) <= run.logged(case.ends):
        raise Missed("the evaluation was done")
    if UNFINISHED in codes:
        _has_stopped(run, case, codes)


def _strike_disk(run: Run, case: Case, rng: random.Random) -> None:
    _until_iteration(run, rng.randrange(ITERATIONS // 2))
    if os.path.ismount(run.output.parent):
        with open(run.output.parent / _BALLAST, "wb") as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 20))
                    ballast.flush()
            except OSError:
                ballast.truncate(max(0, ballast.seek(0, os.SEEK_END) - (1 << 20)))
        return
    for process in run.processes:
        if not process.poll():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def _was_full(run: Run, case: Case, codes: list[int]) -> None:
    (run.output.parent / _BALLAST).unlink(missing_ok=True)
    if not any(codes):
        raise Missed("it had finished")
    if UNFINISHED in codes or run.marker.exists():
        raise RuntimeError(f"a full disk is no stop on purpose: {codes}")
    if not run.last_is_whole():
        raise RuntimeError("the last checkpoint is damaged")


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("SIGKILL", _at_random_iteration(signal.SIGKILL), _was_killed),
        Fault("USR1", _at_random_iteration(signal.SIGUSR1), _has_stopped),
        Fault("TERM", _at_random_iteration(signal.SIGTERM), _has_stopped),
        Fault("checkpoint write", _strike_write, _was_writing),
        Fault("evaluation", _strike_evaluation, _was_evaluating),
        Fault("disk full", _strike_disk, _was_full),
    )
}


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mount a small file system there where that is allowed; else the folder stays as it is, and
    "disk full" is a limit on the size of files."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            # lazily: processes that have just been killed may still hold files
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
