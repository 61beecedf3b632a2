"""The processes that a run has on this machine, started and ended together."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from virtex_d2.engine import signals
from virtex_d2.engine.failures import Board, Failure, say
from virtex_d2.engine.preemption import EXIT_UNFINISHED

# Sent to this process alone, they are meant for the run.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LAST_WORDS = 15  # seconds that processes have to end by themselves after a failure


def run_processes(
    target: Callable[..., Any], arguments: list[tuple], ranks: list[int], host: str, board: Board
) -> int:
    """Start a process for each tuple of arguments, and wait until all have ended.

    Signals to this process go to all of them. When one is killed, the board learns of it; when
    there is a failure on the board, those that do not end by themselves are killed.

    Args:
        target: called with the arguments; can be pickled.
        arguments, ranks: of each process.
        host: the name of this machine.
        board: of the run's failures.

    Returns:
        The exit code: of the failure, or else the one that the processes ended with.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=one) for one in arguments]
    names = {p: f"rank {rank} on {host}" for p, rank in zip(processes, ranks)}
    with _Signals() as forwarded:
        for process in processes:
            signals.held_back(process.start)  # until its main module listens to them
            forwarded.to.append(process)
        forwarded.forward_earlier()
        try:
            failure = _watch(processes, names, board, forwarded)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    if failure is not None:
        return failure.code
    return max((process.exitcode or 0) for process in processes)


def _watch(
    processes: list[BaseProcess], names: dict[BaseProcess, str], board: Board, forwarded: "_Signals"
) -> Failure | None:
    deadline = float("inf")
    failure = None
    while living := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in living], timeout=0.5)
        forwarded.forward_interrupt()
        if failure is None:
            failure = _look(processes, names, board)
            if failure is not None:
                deadline = time.monotonic() + LAST_WORDS
        if time.monotonic() > deadline:
            break
    if failure is None and any(
        process.exitcode not in (0, EXIT_UNFINISHED) for process in processes
    ):
        return _look(processes, names, board)
    return failure


def _look(
    processes: list[BaseProcess], names: dict[BaseProcess, str], board: Board
) -> Failure | None:
    try:
        failure = board.read()
        if failure is None:
            for process in processes:
                if process.exitcode not in (None, 0, EXIT_UNFINISHED):
                    _report_end(names[process], process, board)
            failure = board.read()
    except RuntimeError:  # of a first machine that is gone: the processes say so themselves
        return Failure("the first machine", "the meeting place is gone", 1)
    return failure


def _report_end(name: str, process: BaseProcess, board: Board) -> None:
    """Of a process that could not say itself why it ended."""
    code = process.exitcode
    end = f"ended with exit code {code}"
    if code < 0:
        known = -code in iter(signal.Signals)
        end = f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    if -code == signal.SIGKILL:
        end += " (out of memory? see `dmesg`)"
    if board.claim():
        text = f"{name} (process {process.pid}) {end}."
        say(text)
        board.publish(Failure(name, text, code if code > 0 else 128 - code))


class _Signals:
    """While it is entered, signals to this process are passed on to those that it has started."""

    def __init__(self) -> None:
        self.to: list[BaseProcess] = []
        self._before: dict[int, Any] = {}
        self._early: list[int] = []  # signals
        self._interrupted = float("inf")

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in FORWARDED:
                self._before[number] = signal.signal(number, self._forward)
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward_earlier(self) -> None:
        """What came before all processes were there, to all of them; a second time harms none."""
        if name := signals.received():
            self._early.append(signal.Signals[f"SIG{name}"])
        for number in tuple(self._early):
            self._forward(number, None)

    def forward_interrupt(self) -> None:
        """Ctrl-C reaches all processes of a terminal; `kill -INT` reaches this one alone."""
        if time.monotonic() > self._interrupted + 2:
            self._interrupted = float("inf")
            self._forward(signal.SIGINT, None)

    def _forward(self, number: int, frame: object) -> None:
        self._early.append(number)
        for process in self.to:
            if process.is_alive():
                os.kill(process.pid, number)

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = time.monotonic()


def limit_threads(processes: int) -> None:
    """Share the CPU's cores among processes that compute on it, where nobody has said how."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
