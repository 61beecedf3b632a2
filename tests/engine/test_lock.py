"""One live run in an output folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.lock import RunLock, lock_folder, release_locks

ROOT = Path(__file__).resolve().parents[2]
HOLDS = (
    "import sys, time; from virtex_d2.engine.lock import RunLock; RunLock.beat = 0.1;"
    "from virtex_d2.engine.lock import lock_folder; lock_folder(sys.argv[1], on_lost=print);"
    "print('holds it', flush=True); time.sleep(100)"
)
# As filelock writes it, of a process on a machine that cannot be asked.
ELSEWHERE = "filelock/2\npid=4711\nhost=node9\nmode=lease\ntoken=aa\nduration=1.0\nstart=5\n"


class QuickLock(RunLock):
    beat, stale = 0.1, 1.0


@pytest.fixture
def lock(tmp_path):
    """`lock()` -> a lock on tmp_path."""
    made = []

    def make(on_lost=pytest.fail):
        made.append(QuickLock(tmp_path, on_lost))
        return made[-1]

    yield make
    for one in made:
        one.release()


def test_it_is_there_while_it_is_held(tmp_path, lock):
    held = lock()
    held.acquire()
    assert f"pid={os.getpid()}\n" in (tmp_path / "run.lock").read_text()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_run_is_named_and_a_killed_one_of_this_machine_replaced_at_once(
    tmp_path, monkeypatch
):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setattr(RunLock, "beat", 0.1)
    mine = RunLock(tmp_path, pytest.fail)
    try:
        assert process.stdout.readline() == "holds it\n"
        with pytest.raises(
            InputError, match=f"OUTPUT_DIR .*another run is writing it: process {process.pid} on "
        ):
            mine.acquire()
    finally:
        process.kill()
        process.communicate()
    monkeypatch.setattr(time, "sleep", pytest.fail)  # nothing needs to be waited for
    mine.acquire()
    mine.release()


@pytest.mark.parametrize("content", [ELSEWHERE, "", "{"])
def test_a_holder_that_cannot_be_asked_is_dead_after_some_silence(tmp_path, lock, content, capfd):
    """Also one whose name a crash of its machine has cost."""
    (tmp_path / "run.lock").write_text(content)
    mine = lock()
    mine.acquire()
    known = "process 4711 on node9" if content else "an unknown process"
    assert f"held by {known}" in capfd.readouterr().err or content == "{"
    assert f"pid={os.getpid()}\n" in mine.path.read_text()


def test_who_has_lost_it_learns_by_whom(tmp_path, lock):
    lost = []
    held = lock(on_lost=lost.append)
    held.acquire()
    (tmp_path / "other").write_text(ELSEWHERE)
    (tmp_path / "other").replace(tmp_path / "run.lock")
    deadline = time.monotonic() + 20
    while not lost:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "taken over by process 4711 on node9 (owner-changed). This run ends" in str(lost[0])
    held.release()
    assert (tmp_path / "run.lock").read_text() == ELSEWHERE


def test_twice_in_one_process_is_once(tmp_path):
    lock_folder(tmp_path, pytest.fail)
    lock_folder(tmp_path, pytest.fail)
    release_locks()
    assert list(tmp_path.iterdir()) == []
