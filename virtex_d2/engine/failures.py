"""The failure of one process ends all of them within seconds, and all say whose it was.

Collectives alone would not: the others wait for the failed one until the collective timeout.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch.distributed as dist

from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.lock import release_locks
from virtex_d2.engine.rendezvous import is_told, numbers, tell

POLL = 1.0  # seconds between looks at the board
SILENCE = 180  # seconds; longer than reading any annotation file keeps Python from its threads
GRACE = 5  # seconds for the others to have read about a failure before the board is gone

# Errors that most likely are another process's fault, whose own error is then on its way.
_OF_PEERS = re.compile(r"gloo|nccl|c10d|tcpstore|process ?group|peer|broken pipe|timed out", re.I)


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        who: for example "rank 2 on node1".
        text: what the user should read: a traceback, or an InputError's line.
        code: the exit code of all processes.
    """

    who: str
    text: str
    code: int

    @classmethod
    def of(cls, error: BaseException, who: str, blame: str = "") -> "Failure":
        """Of an exception; `blame` says who has caused it where that is known."""
        if isinstance(error, InputError):
            return cls(who, f"error: {who}: {error}", EXIT_CODE)
        if isinstance(error, KeyboardInterrupt):
            return cls(who, f"{who}: interrupted", 130)
        trace = "".join(traceback.format_exception(error)).rstrip()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        return cls(who, "\n".join(filter(None, (f"{who} failed:", blame, trace))), code)

    @property
    def summary(self) -> str:
        """Its last line."""
        return self.text.splitlines()[-1]


class Board:
    """Where the first failure of a run is written down for all to read."""

    def __init__(self, store: dist.Store):
        self._store = store

    def claim(self) -> bool:
        """Whether this process is the first that has failed; then it must `publish`."""
        return self._store.add("failed", 1) == 1

    def publish(self, failure: Failure) -> None:
        tell(self._store, "failure", json.dumps(asdict(failure)))

    def read(self) -> Failure | None:
        """The failure that is published, if any."""
        if not is_told(self._store, "failure"):
            return None
        return Failure(**json.loads(self._store.get("failure")))


class FailureWatch:
    """A thread in each process of a run that looks whether another one has failed.

    Args:
        store: a connection that nobody else uses.
        rank, world_size, host: of this process.
        speaks: whether this process says so when it ends because of another one.
        serves: whether this process keeps the meeting place open.
        parent: id of the process that has started this one, and without which it must not go on;
            None where there is none of ours.
    """

    current: "FailureWatch | None" = None

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        host: str,
        speaks: bool,
        serves: bool,
        parent: int | None = None,
    ):
        self._store = store
        self._board = Board(store)
        self._rank, self._world_size = rank, world_size
        self._who = f"rank {rank} on {host}"
        self._speaks, self._serves, self._parent = speaks, serves, parent
        self._names = {rank: self._who}
        self._beats: dict[int, tuple[int, int]] = {}
        self._deadline: tuple[float, str] | None = None
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._unanswered = 0
        self._threads = [
            threading.Thread(target=run, name="failure watch", daemon=True)
            for run in (self._run, self._require_answers)
        ]

    def start(self) -> None:
        FailureWatch.current = self
        for thread in self._threads:
            thread.start()

    def know(self, hosts: list[str]) -> None:
        """Let the first process look after the others, once all have come.

        Args:
            hosts: of each rank.
        """
        self._names = {rank: f"rank {rank} on {host}" for rank, host in enumerate(hosts)}

    @contextlib.contextmanager
    def deadline(self, seconds: float, what: str) -> Iterator[None]:
        """All must get through the body in time; else the run ends, naming those that did not."""
        self._deadline = time.monotonic() + seconds, f"{what} (in {seconds:.0f} s)"
        yield
        self._deadline = None
        self._store.add(f"through/{self._rank}", 1)

    def finish(self) -> None:
        """Wait until every process has got here, however long that takes, and end the watch.

        Not a collective: one process may have much to do alone at the end.
        """
        try:
            self._store.add("finished", 1)
            while self._store.add("finished", 0) < self._world_size:
                time.sleep(0.05)
            self._stopped.set()
        except RuntimeError:
            pass  # the meeting place is gone; a thread is about to say so, and to end this
        for thread in self._threads:
            thread.join()
        FailureWatch.current = None

    def leave(self) -> None:
        """The last use of the meeting place; who keeps it open stays until all have left."""
        leave(self._store, "left", self._world_size if self._serves else 0)

    def fail(self, error: BaseException) -> NoReturn:
        """End all processes because of this one's exception."""
        try:
            blame = ""
            if not isinstance(error, InputError) and _OF_PEERS.search(str(error)):
                self._await_cause()
                blame = self._silent()
            if self._board.claim():
                self._tell_all(Failure.of(error, self._who, blame))
            failure = self._published()
        except RuntimeError:  # the meeting place is gone, and with it whoever kept it open
            failure = Failure.of(error, self._who)
            self._only_one_thread()
            say(failure.text)
            leave_now(failure.code)
        self._end(failure)

    def _run(self) -> None:
        while not self._stopped.wait(POLL):
            try:
                failure = self._look()
            except RuntimeError:
                # At the end of a run that is what a slow process sees; and what caused it may be
                # this process's own exception, which says more.
                if self._stopped.wait(GRACE):
                    return
                self._end_alone("is gone (killed? out of memory? its machine down?)")
            self._unanswered = 0
            if failure is not None:
                self._end(failure)

    def _require_answers(self) -> None:
        """A machine that is lost refuses no connection: whoever asks it waits."""
        while not self._stopped.wait(POLL):
            self._unanswered += 1
            if self._unanswered * POLL > SILENCE:
                self._end_alone(f"has not answered for {SILENCE} s (its machine down?)")

    def _end_alone(self, why: str) -> NoReturn:
        self._only_one_thread()
        say(
            f"error: {self._who} has lost the others: the process that kept their meeting place "
            f"open, rank 0 or what had started it, {why}."
        )
        leave_now(1)

    def _look(self) -> Failure | None:
        failure = self._board.read()
        if failure is not None:
            return failure
        self._store.add(f"beat/{self._rank}", 1)
        problem, code = "", 1
        if self._parent is not None and os.getppid() != self._parent:
            problem = f"the process that had started it ({self._parent}) is gone"
        elif self._deadline is not None and time.monotonic() > self._deadline[0]:
            problem, code = self._overdue(), EXIT_CODE
        elif len(self._names) > 1 and self._rank == 0:
            problem = self._unheard()
        if problem and self._board.claim():
            self._tell_all(Failure(self._who, f"error: {self._who}: {problem}", code))
        return self._published() if problem else None

    def _overdue(self) -> str:
        late = [r for r in range(self._world_size) if not self._store.add(f"through/{r}", 0)]
        return (
            f"ranks {numbers(late)} did not get through {self._deadline[1]}. Which network do they "
            "use? See NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more."
        )

    def _unheard(self) -> str:
        """Who has not beaten for many of our looks; not seconds: we may have been stopped."""
        for rank, beat in self._counts().items():
            last, looks = self._beats.get(rank, (-1, 0))
            self._beats[rank] = (beat, looks + 1 if beat == last else 0)
        lost = [self._names[r] for r, (_, looks) in self._beats.items() if looks * POLL > SILENCE]
        return f"no sign of life from {', '.join(lost)} for {SILENCE} s" if lost else ""

    def _silent(self) -> str:
        """In words, the ranks that beat no more."""
        before = self._counts()
        time.sleep(2.5 * POLL)
        after = self._counts()
        names = [
            name
            for rank, name in self._names.items()
            if after[rank] == before[rank] and rank != self._rank
        ]
        if not names:
            return ""
        return f"{', '.join(names)}: no answer any more (killed? out of memory? machine down?)"

    def _counts(self) -> dict[int, int]:
        """How often each rank has beaten."""
        return {rank: self._store.add(f"beat/{rank}", 0) for rank in self._names}

    def _await_cause(self) -> None:
        deadline = time.monotonic() + 3 * POLL
        while time.monotonic() < deadline and self._board.read() is None:
            time.sleep(0.1)

    def _tell_all(self, failure: Failure) -> None:
        say(failure.text)
        self._board.publish(failure)

    def _published(self) -> Failure:
        deadline = time.monotonic() + GRACE
        while (failure := self._board.read()) is None:
            if time.monotonic() > deadline:  # it was claimed by one that was killed right then
                return Failure("another process", "another process failed", 1)
            time.sleep(0.1)
        return failure

    def _end(self, failure: Failure) -> NoReturn:
        """In whichever thread: the other one may wait in a collective, which nothing interrupts."""
        self._only_one_thread()
        if failure.who != self._who:
            if self._rank == 0:
                # In the log, and on the screen of who looks at the first machine alone.
                logging.getLogger("virtex_d2").error("The run ends: %s", failure.text)
            elif self._speaks:
                say(f"{self._who} ends, because {failure.summary}")
        self.leave()
        leave_now(failure.code)

    def _only_one_thread(self) -> None:
        """The first thread goes on to end the process; another one waits for that."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()


def leave(store: dist.Store, counter: str, until: int) -> None:
    """Leave the meeting place; who keeps it open stays until so many have left.

    Not for longer than `GRACE`: some may be dead.
    """
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(RuntimeError):  # it may be gone by now
        store.add(counter, 1)
        while store.add(counter, 0) < until and time.monotonic() < deadline:
            time.sleep(0.05)


def abort(error: InputError) -> NoReturn:
    """End the run, from any thread, as if `error` had been raised in the main one."""
    if FailureWatch.current is not None:
        FailureWatch.current.fail(error)
    say(f"error: {error}")
    leave_now(EXIT_CODE)


def say(text: str) -> None:
    """On stderr, in one piece, after what this process has printed before."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def leave_now(code: int) -> NoReturn:
    """Exit without waiting for anything: threads in a collective, gloo's, or loader workers."""
    # A thread that is stuck in a log handler would keep the handler's lock.
    tidy = threading.Thread(target=_tidy, daemon=True)
    tidy.start()
    tidy.join(GRACE)
    os._exit(code)


def _tidy() -> None:
    release_locks()
    logging.shutdown()
