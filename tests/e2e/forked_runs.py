"""Runs of the tools as processes that are forked from one which has imported everything.

Starting Python and importing torch and detectron2 takes longer than training these small detectors.
A forked run is a process like any other: it has its own log, environment and signals, ends by exit
code or signal, and nothing that it does comes back.

    with Forkserver(tools) as server:
        process = server.start(["tools/train_net.py", ...], environment, log)
        done = server.run(["tools/train_net.py", ...], environment)
"""

import argparse
import atexit
import functools
import json
import logging
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from virtex_d2.engine.parent import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run"]
# What runs import sooner or later, each for itself where it is not here.
MODULES = (
    *("torch", "torchvision", "torch.utils.tensorboard", "setuptools", "matplotlib.pyplot"),
    *("pretrain.trainer", "pretrain.main", "pretrain.methods.captioning.pictures"),
    *("pretrain.methods.captioning.model", "pretrain.methods.classification.classifier"),
    *("virtex_d2.detection.main", "detectron2.utils.collect_env"),
)


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

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for the end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        if not self.poll(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.code()

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
        self._lock = threading.Lock()  # a question and its answer belong together

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
        """Run `python *argv` with this added to the environment; the output goes into `log`.

        `argv` begins with a script, or with `-m` and a module; `tests.processes.python(2)` makes
        ranks of it, which are forked like itself.
        """
        return self._start(argv=list(argv), environment=dict(environment), log=str(log))

    def run(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cwd: str | Path | None = None,
        timeout: float = 300.0,
        input: str = "",
    ) -> subprocess.CompletedProcess:
        """Run `python *argv` to its end, as subprocess.run does with capture_output and text.

        Args:
            argv: a script and its arguments.
            environment: all of the process's.
            cwd: the folder that it works in; ours by default.
            timeout: seconds, after which it is killed with all that it started.
            input: what it reads from its standard input.

        Raises:
            subprocess.TimeoutExpired: it was killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("in", "out", "err")]
            files[0].write_text(input, errors="surrogateescape")
            process = self._start(
                argv=list(argv),
                environment=dict(environment),
                log=str(files[1]),
                errors=str(files[2]),
                stdin=str(files[0]),
                cwd=str(cwd or Path.cwd()),
                whole=True,
            )
            in_time = process.poll(timeout)
            if not in_time:
                os.killpg(process.pid, signal.SIGKILL)
                process.poll(timeout)
            code = self.code(process.pid)
            output, errors = (
                file.read_text(errors="surrogateescape") if file.exists() else ""
                for file in files[1:]
            )
        if not in_time:
            raise subprocess.TimeoutExpired(list(argv), timeout, output, errors)
        return subprocess.CompletedProcess(list(argv), code, output, errors)

    def code(self, pid: int) -> int:
        """Of a process that has ended."""
        return self._ask({"wait": pid})

    def _start(self, **run) -> Process:
        return Process(self._ask(run), self)

    def _ask(self, question: dict) -> int:
        with self._lock:
            self._server.stdin.write(json.dumps(question) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline())


@functools.cache
def shared_server() -> Forkserver:
    """The server of this test process: started by its first use, ended with the process."""
    server = Forkserver(MODULES)
    atexit.register(server.__exit__)
    return server.__enter__()


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


def _become(
    server: int,
    argv: list[str],
    environment: dict[str, str],
    log: str,
    errors: str | None = None,
    stdin: str = os.devnull,
    cwd: str = ".",
    whole: bool = False,
) -> None:
    """In the fork: be `python *argv`.

    The environment is added to the server's or, with `whole`, replaces it.
    """
    end_with_parent(signal.SIGKILL, server)
    os.setsid()
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    for descriptor, file in ((1, log), (2, errors)):
        written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(file, written, 0o666) if file else 1, descriptor)
    if whole:
        os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what is in the background
    sys.stdin = os.fdopen(0, closefd=False)  # the one that was here has read ahead
    code = 0
    try:
        if argv[:2] == TORCHRUN:
            argv = _be_a_rank(argv[2:])
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path[0] = str(Path(argv[0]).resolve().parent)
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


def _be_a_rank(arguments: list[str]) -> list[str]:
    """Return in each of N forks, which is then a rank; this process waits for them and ends.

    As torchrun does it: all are told to end where one fails. But torchrun starts Python anew for
    each; what is about torchrun itself is tested in tests/engine.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--nproc-per-node", type=int)
    parser.add_argument("script", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    this = os.getpid()
    world = {"WORLD_SIZE": str(args.nproc_per_node), "MASTER_ADDR": "127.0.0.1"}
    world |= {"LOCAL_WORLD_SIZE": world["WORLD_SIZE"], "MASTER_PORT": port}
    ranks = []
    for rank in range(args.nproc_per_node):
        pid = os.fork()
        if not pid:
            end_with_parent(signal.SIGKILL, this)
            os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            return args.script
        ranks.append(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    os._exit(int(failed))


if __name__ == "__main__":
    for _module in sys.argv[1:]:
        __import__(_module)
    _serve()
