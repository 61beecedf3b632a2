"""Runs of the tools as processes that are forked from one which has imported everything.

Starting Python and importing torch and detectron2 takes longer than training these small detectors.
A forked run is a process like any other: it has its own log, environment and signals, ends by exit
code or signal, and nothing that it does comes back.

    with Forkserver(tools) as server:
        process = server.start(["tools/train_net.py", ...], environment, log)
"""

import json
import logging
import multiprocessing.util
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from virtex_d2.runtime.parent import end_with_parent

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A run's process: its end, and the moment of it.

    Attributes:
        pid: its id.
        ended: time.monotonic() of its end; None while it lives.
    """

    def __init__(self, pid: int, server: "Forkserver"):
        self.pid = pid
        self.ended: float | None = None
        self._server = server
        self._descriptor = os.pidfd_open(pid)

    def poll(self, seconds: float = 0.0) -> bool:
        """Wait for the end for so long; whether it has come."""
        if self.ended is None and select.select([self._descriptor], [], [], seconds)[0]:
            self.ended = time.monotonic()
            os.close(self._descriptor)
        return self.ended is not None

    def code(self) -> int:
        """The exit code of an ended process; that of signal N is -N."""
        return self._server.code(self.pid)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if not self.poll():
            os.kill(self.pid, number)


class Forkserver:
    """Starts runs. To be entered; all of its runs end with it.

    Args:
        modules: what it imports before the first run.
    """

    def __init__(self, modules: Sequence[str]):
        self._modules = modules

    def __enter__(self) -> "Forkserver":
        self._server = subprocess.Popen(
            [sys.executable, __file__, *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """Run `python *argv` with this added to the environment; the output goes into `log`."""
        self._ask({"argv": list(argv), "environment": dict(environment), "log": str(log)})
        return Process(self._answer(), self)

    def code(self, pid: int) -> int:
        """Of a process that has ended."""
        self._ask({"wait": pid})
        return self._answer()

    def _ask(self, question: dict) -> None:
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> int:
        return int(self._server.stdout.readline())


def _serve() -> None:
    """In the server: a question a line, answered by one number."""
    codes: dict[int, int] = {}
    server = os.getpid()
    while line := sys.stdin.readline():
        question = json.loads(line)
        if "wait" in question:
            pid = question["wait"]
            if pid not in codes:
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = codes[pid]
        else:
            answer = os.fork()
            if not answer:
                _become(server, **question)
        print(answer, flush=True)


def _become(server: int, argv: list[str], environment: dict[str, str], log: str) -> None:
    """In the fork: be `python *argv`."""
    end_with_parent(signal.SIGKILL, server)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = argv
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    multiprocessing.util._exit_function()  # ends loader workers, as the interpreter would
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for _module in sys.argv[1:]:
        __import__(_module)
    _serve()
