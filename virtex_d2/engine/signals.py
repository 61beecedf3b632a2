"""The signals that ask a run to stop: kept from its first moment on, until it can answer them.

USR1 and TERM are what schedulers send before they kill. Here they only leave a note;
`virtex_d2.engine.stopping` acts on it. INT (Ctrl-C) keeps its meaning: the run ends at once.
Imports nothing but the standard library: what a signal finds before `listen`, it ends.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

STOPPING = (signal.SIGUSR1, signal.SIGTERM)
# A terminal sends INT to all processes of a run; helpers leave the answer to the training process.
_IGNORED_BY_HELPERS = (signal.SIGUSR1, signal.SIGINT)

Result = TypeVar("Result")


class Interrupted(BaseException):
    """A signal has come to a process that computes or waits alone (`interruptible`)."""


_received: list[int] = []
_RUNNING_OUT = -1
_patience: int | None = None  # seconds until a signal ends what runs; None: it does not
_started = time.monotonic()
_listening = False


def listen() -> None:
    """Note USR1 and TERM from now on, instead of ending by them. In the main thread."""
    global _started, _listening
    _started, _listening = time.monotonic(), True
    for number in STOPPING:
        signal.signal(number, _note)
    signal.signal(signal.SIGALRM, _interrupt)
    release()


def release() -> None:
    """Let signals come that were `held_back` when this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def stop_listening() -> None:
    """Let USR1 and TERM end the process as they do elsewhere, also those that have been noted."""
    global _listening
    if _listening:
        _listening = False
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        for number in _received:
            os.kill(os.getpid(), number)


def ignore() -> None:
    """Let further signals change nothing, up to the end of the process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # what Python's own shutdown leaves in place


def received() -> str:
    """The first signal that was noted, as "USR1" or "TERM"; "" where there was none."""
    return signal.Signals(_received[0]).name.removeprefix("SIG") if _received else ""


def seconds_since_start() -> float:
    """Since `listen`, or where that was not called since this module was imported."""
    return time.monotonic() - _started


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    _interrupt(number)


def _interrupt(number: int, frame: FrameType | None = None) -> None:
    global _patience
    if _patience == 0 or (_patience == _RUNNING_OUT and number == signal.SIGALRM):
        _patience = None  # a second one finds the first on its way
        raise Interrupted
    if _patience is not None and _patience > 0:
        signal.alarm(_patience)
        _patience = _RUNNING_OUT  # schedulers repeat their signals


@contextlib.contextmanager
def interruptible(patience: int = 0) -> Iterator[None]:
    """A signal that comes, or has come, ends the body: for what one process computes alone.

    With `patience`, if the body takes that many seconds more: for a wait that may have no end.

    As Ctrl-C would, anywhere in it: nothing in the body may take part in a collective, or leave
    something behind that matters.

    Raises:
        Interrupted: there was a signal. Not where this process does not listen.
    """
    global _patience
    _patience = patience if _listening else None
    if _received:
        _interrupt(_received[0])
    try:
        yield
    finally:
        _patience = None
        if _received and patience:
            signal.alarm(0)


def held_back(call: Callable[[], Result]) -> Result:
    """What `call` returns; signals to this thread wait meanwhile.

    For starting helper processes: they begin with the signals blocked, so that none finds them
    before `start_helper` has run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return call()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_helper(_: int = 0) -> None:
    """In a data loader's worker: leave the signals to the training process.

    Schedulers send them to all processes of a job. A worker that ends by one takes the run with it,
    before it has written its checkpoint. TERM from the training process itself still ends the
    worker: that is how multiprocessing ends those that are left over, and then waits for them.
    Programs that a worker starts inherit all of it.
    """
    for number in _IGNORED_BY_HELPERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_with_parents_term, daemon=True).start()


def _end_with_parents_term() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (parent.pid if parent else os.getppid()):
        pass
    os._exit(0)
