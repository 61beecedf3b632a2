"""A disk that is full or read-only in the middle of a run stops it, and harms nothing."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    Retention,
    StateWriter,
    last_whole_checkpoint,
)
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import in_bytes, stop_where_disk_is_full
from virtex_d2.engine.hooks import PeriodicCheckpointer

ROOT = Path(__file__).resolve().parents[2]


def _may_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    available = shutil.which("unshare") and shutil.which("mount")
    return bool(available) and subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not _may_mount(), reason="needs the right to mount (root)")

# A run that saves every iteration until it cannot; what it prints is looked at after it, because
# its mounts are gone then.
RUN = """
import os, shutil, subprocess, sys
import torch
from virtex_d2.engine.checkpointer import StateWriter
from virtex_d2.engine.checkpointer import AtomicCheckpointer
from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.engine.checkpointer import Retention

folder, copy, how, background = sys.argv[1:]

def save_until_it_fails():
    model = torch.nn.Linear(512, 512)  # a MiB
    checkpointer = AtomicCheckpointer(model, folder, writer=StateWriter(background == "True"))
    for iteration in range(12):
        torch.nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if how == "read-only" and iteration == 2:
            checkpointer.wait()
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    checkpointer.wait()

try:
    with exit_on_input_error():
        save_until_it_fails()
finally:
    shutil.copytree(folder, copy)
"""


def run_on_small_disk(tmp_path, how, background):
    """In a namespace of its own, with 4.5 MiB for the checkpoints."""
    (tmp_path / "run").mkdir()
    script = tmp_path / "run.py"
    script.write_text(RUN)
    shell = 'mount -t tmpfs -o size=4608k tmpfs "$1" && exec "$2" "$3" "$1" "$4" "$5" "$6"'
    names = [tmp_path / "run", sys.executable, script, tmp_path / "left", how, background]
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", *map(str, names)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_stopped_well(done, folder, last):
    """One line about what happened; every checkpoint whole, and nothing else there."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"model_{last + 1:07d}.pth could not be written" in line
    assert "It takes 1 MiB" in line
    names = [f"model_{iteration:07d}.pth" for iteration in range(last + 1)]
    assert sorted(path.name for path in folder.iterdir()) == ["last_checkpoint", *names]
    assert last_whole_checkpoint(folder) == str(folder / names[-1])
    model = torch.nn.Linear(512, 512)
    state = AtomicCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert state["iteration"] == last
    assert torch.all(model.weight == last)
    return line


@needs_mounts
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_the_run_with_the_checkpoints_before_it(tmp_path, background):
    done = run_on_small_disk(tmp_path, "full", background)
    line = assert_stopped_well(done, tmp_path / "left", 3)
    assert f"{tmp_path}/run: " in line
    assert "No space left on device" in line
    assert "KiB are free in" in line
    assert "SOLVER.CHECKPOINT_KEEP_LAST" in line
    assert "--resume" in line


@needs_mounts
@pytest.mark.parametrize("background", [False, True])
def test_a_file_system_that_becomes_read_only_stops_the_run(tmp_path, background):
    done = run_on_small_disk(tmp_path, "read-only", background)
    line = assert_stopped_well(done, tmp_path / "left", 2)
    assert "Read-only file system" in line


@pytest.mark.parametrize("background", [False, True])
def test_a_limit_on_files_stops_the_run_as_a_full_disk_does(tmp_path, run_python, background):
    """Where nobody may mount: the fourth checkpoint is larger than a file may be."""
    script = textwrap.dedent("""
        import resource
        import torch

        save = torch.save
        def fourth_is_too_large(state, file):
            if state["iteration"] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            save(state, file)
        torch.save = fourth_is_too_large
    """)
    arguments = (tmp_path / "run", tmp_path / "left", "limit", background)
    # What is left cannot be copied under the limit, but be moved.
    body = RUN.replace("shutil.copytree(folder, copy)", "os.rename(folder, copy)")
    done = run_python("-c", script + body, *arguments)
    assert "File too large" in assert_stopped_well(done, tmp_path / "left", 3 - 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_stops_the_run(tmp_path):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(3, 2), str(tmp_path))
    checkpointer.save("model_0000001")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            checkpointer.save("model_0000002")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_other_files_of_a_run_on_a_full_disk_are_told_as_well(tmp_path):
    message = r"metrics\.json: could not be written: No space left"
    with pytest.raises(InputError, match=message), stop_where_disk_is_full(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.json")
    with pytest.raises(FileNotFoundError), stop_where_disk_is_full(tmp_path):
        (tmp_path / "absent").read_bytes()


class Run:
    start_iter, max_iter = 0, 1000


def preflight(folder, free, optimizer, monkeypatch, caplog, retention=None):
    model = torch.nn.Linear(256, 1024, bias=False)  # a MiB
    kind, options = optimizer
    checkpointer = AtomicCheckpointer(model, str(folder), writer=StateWriter(), retention=retention)
    hook = PeriodicCheckpointer(checkpointer, 100, kind(model.parameters(), lr=0.1, **options))
    hook.trainer = Run()
    usage = shutil.disk_usage(folder)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        hook.before_train()
    return caplog.text


SGD = (torch.optim.SGD, {"momentum": 0.9})


@pytest.mark.parametrize(
    ("optimizer", "size"), [(SGD, 2), ((torch.optim.SGD, {}), 1), ((torch.optim.AdamW, {}), 3)]
)
def test_too_little_room_for_the_runs_checkpoints_is_told_at_the_start(
    tmp_path, optimizer, size, monkeypatch, caplog
):
    """Ten and the final one; the optimizer's state is there after the first step only."""
    needed = 11 * size * 2**20
    assert not preflight(tmp_path, needed, optimizer, monkeypatch, caplog)
    told = preflight(tmp_path, needed - 1, optimizer, monkeypatch, caplog)
    assert f"the 11 checkpoints to come take some {11 * size} MiB, {size} MiB each" in told
    assert str(tmp_path) in told


def test_checkpoints_that_give_way_to_new_ones_are_not_counted_twice(tmp_path, monkeypatch, caplog):
    keep = Retention(last=2)
    needed = (2 + 1 + 1) * 2 * 2**20  # the third stands beside them while the first is removed
    assert not preflight(tmp_path, needed, SGD, monkeypatch, caplog, keep)
    assert preflight(tmp_path, needed - 1, SGD, monkeypatch, caplog, keep)
    (tmp_path / "model_0000001.pth").write_bytes(bytes(2 * 2**20))
    assert not preflight(tmp_path, needed - 2 * 2**20, SGD, monkeypatch, caplog, keep)


def test_sizes_are_told_in_units_for_people():
    sizes = (5, 2000, 3 * 2**20, 355e6, 12.34 * 2**30)
    assert [in_bytes(size) for size in sizes] == [
        "5 bytes",
        "2 KiB",
        "3 MiB",
        "339 MiB",
        "12.3 GiB",
    ]
