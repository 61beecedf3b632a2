"""A child does not outlive its parent, however that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")

ROOT = Path(__file__).resolve().parents[2]
# The child holds the pipe open for as long as it lives, and says when it listens.
PARENT = """
import functools, os, signal, subprocess, sys
from virtex_d2.engine.parent import end_with_parent

subprocess.run(
    [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"],
    preexec_fn=functools.partial(end_with_parent, signal.SIGTERM, os.getpid()),
)
"""
ORPHAN = """
import signal, sys
from virtex_d2.engine.parent import end_with_parent

end_with_parent(signal.SIGKILL, int(sys.argv[1]))
print("went on")
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        # a test run in the background ignores the signal, and what it starts would, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_child_ends_with_its_parent(number):
    with start(PARENT) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        # the pipe's end is the child's: whoever does not end keeps it open past the time limit
        assert parent.communicate(timeout=60)[0] == ""


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    with start(ORPHAN, "1") as child:  # any process but the one that starts it
        assert child.communicate(timeout=60)[0] == ""
        assert child.returncode == 1
