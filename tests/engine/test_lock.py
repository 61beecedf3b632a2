"""One live run in an output folder."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.lock import Holder, RunLock, lock_folder, release_locks

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
    import sys, time
    from virtex_d2.engine.lock import lock_folder
    lock_folder(sys.argv[1], on_lost=print)
    print("holds it", flush=True)
    time.sleep(100)
"""


class QuickLock(RunLock):
    beat, stale = 0.1, 1.0


@pytest.fixture
def lock(tmp_path):
    """`lock(**changes)` -> a lock on tmp_path whose process differs from this one by `changes`."""
    made = []

    def make(on_lost=pytest.fail, **changes):
        lock = QuickLock(tmp_path, on_lost)
        lock._me = dataclasses.replace(lock._me, **changes)
        made.append(lock)
        return lock

    yield make
    for one in made:
        one._released.set()


ELSEWHERE = {"host": "node9", "process": "another-boot pid:[1] 5"}


def leave(folder, age=0.0, **changes):
    """A lock of some process that is not there to touch it any more."""
    holder = dataclasses.replace(Holder.this_process({}), **changes)
    path = folder / "run.lock"
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_it_is_there_while_it_is_held(tmp_path, lock):
    held = lock()
    held.acquire()
    content = json.loads((tmp_path / "run.lock").read_text())
    assert content["pid"] == os.getpid()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_run_on_another_machine_is_named(tmp_path, lock):
    lock(**ELSEWHERE, pid=4711, job="cluster:88", since="2026-01-02 03:04:05+00:00").acquire()
    expected = (
        "OUTPUT_DIR .*another run is writing it: process 4711 on node9 .Slurm job 88., "
        "since 2026-01-02 03:04:05"
    )
    with pytest.raises(InputError, match=expected):
        lock().acquire()
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "node9"


def test_a_live_run_on_this_machine_is_named_at_once_and_a_killed_one_replaced(
    tmp_path, lock, monkeypatch
):
    program = tmp_path / "program.py"
    program.write_text("\n".join(line[4:] for line in HOLDS.splitlines()))
    folder = tmp_path / "run"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, program, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "holds it\n"
        mine = QuickLock(folder, pytest.fail)
        monkeypatch.setattr(time, "sleep", pytest.fail)  # nothing needs to be waited for
        with pytest.raises(InputError, match=f"process {process.pid} on "):
            mine.acquire()
    finally:
        process.kill()
        process.wait()
    mine.acquire()
    assert mine._read().pid == os.getpid()
    mine.release()


def test_a_later_process_with_the_same_id_is_not_the_holder(tmp_path, lock):
    here = Holder.this_process({}).process.split()
    leave(tmp_path, process=" ".join([*here[:-1], "1"]), pid=os.getpid())
    lock().acquire()


def test_a_holder_on_a_lost_machine_is_dead_after_some_silence(tmp_path, lock, capfd):
    leave(tmp_path, **ELSEWHERE)
    start = time.monotonic()
    lock().acquire()
    assert time.monotonic() - start >= 0.9 * QuickLock.stale
    assert "held by process" in capfd.readouterr().err


def test_one_that_has_been_silent_for_long_needs_no_more_waiting(tmp_path, lock, monkeypatch):
    leave(tmp_path, age=100, **ELSEWHERE)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    lock().acquire()


def test_the_clock_of_this_machine_does_not_matter(tmp_path, lock, monkeypatch):
    leave(tmp_path, **ELSEWHERE)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    start = time.monotonic()
    lock().acquire()
    assert time.monotonic() - start >= 0.9 * QuickLock.stale


def test_a_requeued_job_takes_its_own_lock_over(tmp_path, lock, monkeypatch):
    leave(tmp_path, **ELSEWHERE, job="cluster:88", restarts=1)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    lock(job="cluster:88", restarts=2).acquire()


@pytest.mark.parametrize("changes", [{"job": "cluster:89"}, {"job": "other:88"}, {"restarts": 1}])
def test_another_job_or_another_step_does_not(lock, changes):
    lock(**ELSEWHERE, job="cluster:88", restarts=1).acquire()
    with pytest.raises(InputError, match="another run is writing it"):
        lock(**{"job": "cluster:88", "restarts": 2, **changes}).acquire()


def test_slurms_variables_say_which_job_it_is():
    environment = {
        "SLURM_JOB_ID": "88",
        "SLURM_CLUSTER_NAME": "big",
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "gpu7",
    }
    holder = Holder.this_process(environment)
    assert (holder.host, holder.job, holder.restarts) == ("gpu7", "big:88", 3)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "node9"}'])
def test_a_lock_that_a_full_disk_left_is_judged_by_its_age(tmp_path, lock, content):
    (tmp_path / "run.lock").write_text(content)
    lock().acquire()


def test_only_one_of_two_that_find_a_dead_lock_gets_it(tmp_path, lock):
    """The second had judged the old one before the first took the folder."""
    leave(tmp_path, age=100, **ELSEWHERE)
    first, second = lock(), lock()
    judged = second._read()
    first.acquire()
    second._remove(judged)
    assert second._read().token == first._me.token
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_who_has_lost_it_learns_by_whom(tmp_path, lock):
    lost = []
    held = lock(on_lost=lost.append)
    held.acquire()
    leave(tmp_path, **ELSEWHERE, pid=4711)
    held._thread.join(timeout=10)
    assert "another run has taken it over: process 4711 on node9" in str(lost[0])
    held.release()
    assert (tmp_path / "run.lock").exists(), "it is another's"


def test_who_finds_it_removed_takes_it_again(tmp_path, lock):
    held = lock()
    held.acquire()
    (tmp_path / "run.lock").unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / "run.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.release()


def test_twice_in_one_process_is_once(tmp_path):
    lock_folder(tmp_path, pytest.fail)
    lock_folder(tmp_path, pytest.fail)
    release_locks()
    assert list(tmp_path.iterdir()) == []
