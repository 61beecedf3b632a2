"""A run that is asked to stop: all processes agree where, leave a checkpoint, and end together.

What asks: USR1 or TERM, a time budget, the end of the Slurm job, a file STOP in OUTPUT_DIR. Each
process notices that for itself (`Watch`), and nothing happens until all have agreed, between two
iterations or two batches of an evaluation:

    watch(cfg.OUTPUT_DIR, args.time_budget)     # setup_run does it
    check()                                     # in all processes: raises StopRequested in all
    for batch in abandonable(loader): ...       # the same, for loops of unequal length

`pretrain.trainer` and `virtex_d2.detection.trainer` answer through `virtex_d2.engine.stopping`.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm

from virtex_d2.engine import signals
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

EXIT_UNFINISHED = 75  # EX_TEMPFAIL of <sysexits.h>: try again later

STOP_FILE = "STOP"
STOP_FILE_PERIOD = 1.0  # seconds between looks at a file system that may be slow

# What a process may have noticed, as processes tell it to each other: the last one wins.
REASONS = ("", "the file STOP", "time budget", "end of the Slurm job", "USR1", "TERM")

# The rest of a Slurm job that is left for the last iteration, its checkpoint and the end, in
# seconds; of short jobs at most a tenth.
SLURM_MARGIN = 120.0

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class StopRequested(BaseException):
    """All processes have agreed to stop, and are at the same place.

    Not an Exception: nothing that handles errors on the way is to take it for one.

    Attributes:
        reason: of `REASONS`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Unfinished(SystemExit):
    """Ends a process whose run has stopped on purpose, with exit code 75. Raised in all of them."""

    def __init__(self) -> None:
        super().__init__(EXIT_UNFINISHED)


@contextlib.contextmanager
def exit_at_once_if_unfinished() -> Iterator[None]:
    """Around all that a tool does: ends the process when the body has come to `Unfinished`.

    Without the interpreter's own shutdown: with torch and detectron2 loaded that takes seconds on a
    busy machine, of the few that a scheduler leaves. Everything has been written and closed before.
    """
    try:
        yield
    except SystemExit as end:
        if end.code != EXIT_UNFINISHED:
            raise
        signals.ignore()
        for helper in multiprocessing.active_children():  # loader workers
            helper.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_UNFINISHED)


class Watch:
    """What this process knows of reasons to stop.

    Args:
        folder: OUTPUT_DIR.
        budget: seconds that the process may run; None: without a limit. Where it is None and Slurm
            tells the end of the job, that is the limit.
    """

    def __init__(self, folder: str, budget: float | None):
        self._stop_file = Path(folder) / STOP_FILE
        self._deadline = _slurm_deadline() if budget is None else time.time() + budget
        if budget is not None:
            self._deadline -= signals.seconds_since_start()
        self._timed = "end of the Slurm job" if budget is None else "time budget"
        self._next_look = 0.0
        self._found = False

    def reason(self) -> str:
        """Of `REASONS`; "" where there is none."""
        if name := signals.received():
            return name
        if self._deadline is not None and time.time() >= self._deadline:
            return self._timed
        return REASONS[1] if self._stop_file_exists() else ""

    def _stop_file_exists(self) -> bool:
        if comm.is_main_process() and not self._found and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + STOP_FILE_PERIOD
            self._found = self._stop_file.exists()
        return self._found

    def obeyed(self) -> None:
        """Take the file STOP away: it is for one stop, not for the run that is resumed."""
        self._stop_file.unlink(missing_ok=True)


_watch: Watch | None = None


def watch(folder: str, budget: str | None = None) -> None:
    """From now on this process looks out for reasons to stop; before that it has none.

    Args:
        folder: OUTPUT_DIR.
        budget: of `seconds_of`; None: what VIRTEX_TIME_BUDGET says.
    """
    global _watch
    name = "--time-budget"
    if budget is None:
        name, budget = "VIRTEX_TIME_BUDGET", os.environ.get("VIRTEX_TIME_BUDGET") or None
    _watch = Watch(folder, None if budget is None else seconds_of(budget, name))


def stop_watching() -> None:
    """No reason counts any more."""
    global _watch
    _watch = None


def obeyed() -> None:
    """What asked for the stop is not to stop the next run as well. In the first process."""
    if _watch is not None:
        _watch.obeyed()


def check() -> None:
    """Ask all processes whether one has a reason to stop; in all of them at the same place.

    Costs one all-reduce of two numbers over gloo.

    Raises:
        StopRequested: one has; in all of them.
    """
    if _watch is None:
        return
    votes = _votes(done=False)
    if comm.get_world_size() > 1:
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    _raise_if_agreed(votes)


def settled(evaluate: Callable[[], Result]) -> Result:
    """What `evaluate` returns, once it is done in all processes.

    Where the first process still computes results, alone and `signals.interruptible`, a signal to
    it ends that.

    Raises:
        StopRequested: one has a reason to stop; in all of them.
    """
    result = None
    with contextlib.suppress(signals.Interrupted):
        result = evaluate()
    check()
    return result


def checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, with a `check` before each: of all processes equally many.

    Raises:
        StopRequested: while iterating, in all processes before the same batch.
    """
    for batch in batches:
        check()
        yield batch


def abandonable(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, of which processes may have different numbers, and take different times.

    No process waits for another before its last batch: they ask each other in rounds, and one goes
    on with its batches until a round's answer is there. In a process that has come to its end,
    returns when all have.

    Raises:
        StopRequested: while iterating, in all processes, each between two of its own batches.
    """
    if comm.get_world_size() == 1:
        yield from checked(batches)
        return
    if _watch is None:
        yield from batches
        return
    rounds = _Rounds()
    for batch in batches:
        rounds.poll()
        yield batch
    rounds.finish()


class _Rounds:
    """All processes answer each round; all see the same answers, if not at the same time."""

    def __init__(self) -> None:
        self._group = comm._get_global_gloo_group()
        self._begin(done=False)

    def poll(self) -> None:
        """Take a round's answer if it is there, and begin the next."""
        if self._round.is_completed():
            self._end()
            self._begin(done=False)

    def finish(self) -> None:
        """Take part in further rounds until all processes have come to the end."""
        while self._end():
            self._begin(done=True)

    def _begin(self, done: bool) -> None:
        self._votes = _votes(done)
        self._round = dist.all_reduce(
            self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _end(self) -> bool:
        """Whether a process was still at its batches."""
        self._round.wait()
        _raise_if_agreed(self._votes)
        return bool(self._votes[1])


def _votes(done: bool) -> torch.Tensor:
    """(2,): number of this process's reason, and whether it has batches left."""
    return torch.tensor([REASONS.index(_watch.reason()), int(not done)])


def _raise_if_agreed(votes: torch.Tensor) -> None:
    if number := int(votes[0]):
        raise StopRequested(REASONS[number])


def seconds_of(text: str, name: str) -> float:
    """A time budget in seconds: "45m", "23.5h" (s, m, h, d), or "[DAYS-]HH:MM:SS"."""
    if match := _CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if match := _NUMBER.fullmatch(text.strip()):
        return float(match.group(1)) * _SECONDS[match.group(2)]
    raise InputError(
        f"{name} {text!r}: expected a time such as 45m, 23.5h, 2d or [DAYS-]HH:MM:SS, how long the "
        "run may take until it writes a checkpoint and ends."
    )


def _slurm_deadline() -> float | None:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        return None
    if float(end) <= time.time():
        logger.info(
            "SLURM_JOB_END_TIME, %s, is past: of a job that is over. It is no limit.",
            time.ctime(float(end)),
        )
        return None
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    length = float(end) - (float(start) if start.isdigit() else time.time())
    deadline = float(end) - min(SLURM_MARGIN, length / 10)
    logger.info("The Slurm job ends at %s: the run will stop before.", time.ctime(float(end)))
    return deadline
