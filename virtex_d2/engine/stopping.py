"""A run that is asked to stop: all processes agree where, leave a checkpoint, and end together.

What asks: USR1 or TERM, a time budget, the end of the Slurm job, a file STOP in OUTPUT_DIR. Each
process notices that for itself (`Watch`), and nothing happens until all have agreed, between two
iterations or two batches of an evaluation:

    watch(cfg.OUTPUT_DIR, args.time_budget)     # setup_run does it
    check()                                     # in all processes: raises StopRequested in all
    for batch in abandonable(loader): ...       # the same, for loops of unequal length

A `StoppableTrainer` answers. An iteration is an update of the weights and what follows from it:
evaluation, checkpoint, export. A stop comes between the two (`StopHook`), or within an evaluation,
which is then abandoned. Its checkpoint says so, and the resumed run begins with what follows from
the last update. So what it evaluates and keeps is what a run would have that never stopped.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm

from virtex_d2.engine import signals
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import write_json
from virtex_d2.engine.hooks import MetricsWriter
from virtex_d2.engine.unfinished import Unfinished

logger = logging.getLogger(__name__)

MARKER_VARIABLE = "VIRTEX_REQUEUE_MARKER"

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


class Watch:
    """What this process knows of reasons to stop.

    Args:
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
        if comm.is_main_process() and not self._found and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + STOP_FILE_PERIOD
            self._found = self._stop_file.exists()
        return REASONS[1] if self._found else ""

    def obeyed(self) -> None:
        """Delete the STOP file: it is for one stop, not for the run that is resumed."""
        self._stop_file.unlink(missing_ok=True)


_watch: Watch | None = None


def watch(folder: str, budget: str | None = None) -> None:
    """From now on this process looks out for reasons to stop; before that it has none.

    Args:
        budget: of `seconds_of`; None: what VIRTEX_TIME_BUDGET says.
    """
    global _watch
    name = "--time-budget"
    if budget is None:
        name, budget = "VIRTEX_TIME_BUDGET", os.environ.get("VIRTEX_TIME_BUDGET") or None
    _watch = Watch(folder, None if budget is None else seconds_of(budget, name))


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
    on with its batches until a round's answer is there, which all see alike. In a process that has
    come to its end, returns when all have.

    Raises:
        StopRequested: while iterating, in all processes, each between two of its own batches.
    """
    if comm.get_world_size() == 1:
        yield from checked(batches)
        return
    if _watch is None:
        yield from batches
        return
    group = comm._get_global_gloo_group()

    def ask(done: bool) -> tuple[torch.Tensor, dist.Work]:
        votes = _votes(done)
        return votes, dist.all_reduce(votes, dist.ReduceOp.MAX, group=group, async_op=True)

    votes, answer = ask(done=False)
    for batch in batches:
        if answer.is_completed():
            answer.wait()
            _raise_if_agreed(votes)
            votes, answer = ask(done=False)
        yield batch
    while True:
        answer.wait()
        _raise_if_agreed(votes)
        if not votes[1]:  # nobody was still at its batches
            return
        votes, answer = ask(done=True)


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


class StopHook(HookBase):
    """Stands behind the hooks of an update and before those that follow from it.

    Attributes:
        unfinished: whether the run was loaded from a checkpoint behind whose update nothing was
            done of what follows.
    """

    def __init__(self) -> None:
        self.unfinished = False

    def after_step(self) -> None:
        check()

    def state_dict(self) -> dict:
        return {"unfinished": True} if self.unfinished else {}

    def load_state_dict(self, state: dict) -> None:
        self.unfinished = state["unfinished"]


class StoppableTrainer(TrainerBase):
    """For a trainer with `checkpointer` to inherit from first, and one `StopHook` among its hooks.

    Hooks behind that one may have `owed(iteration)`: whether a run that is resumed behind that
    iteration still has to do their part of it. Called in every process that has the hook.
    """

    def before_checkpoint(self) -> None:
        """What all processes do together before a checkpoint that no hook has prepared."""

    def before_train(self) -> None:
        super().before_train()
        with self._stopping(trained=False):
            check()
            self._finish_iteration()

    def after_step(self) -> None:
        with self._stopping(trained=True):
            super().after_step()

    @property
    def unfinished(self) -> bool:
        """Whether something that follows from the last update is still to be done."""
        return self._stop_hook.unfinished

    @property
    def _stop_hook(self) -> StopHook:
        return next(hook for hook in self._hooks if isinstance(hook, StopHook))

    def is_finished(self) -> bool:
        """Whether nothing is left to train, or of what follows. To be called in all processes."""
        done = self.start_iter >= self.max_iter and not self.unfinished
        return done and not self._owed(self.start_iter - 1)

    def _owed(self, iteration: int) -> list[HookBase]:
        """The hooks that have to make up for an iteration."""
        following = self._hooks[self._hooks.index(self._stop_hook) + 1 :]
        return [hook for hook in following if hasattr(hook, "owed") and hook.owed(iteration)]

    def _finish_iteration(self) -> None:
        """Do what the run that is resumed has left of its last iteration."""
        iteration, stop = self.start_iter - 1, self._stop_hook
        if iteration < 0:
            return
        following = self._hooks[self._hooks.index(stop) + 1 :]
        if not stop.unfinished:
            owed = self._owed(iteration)
            writers = [hook for hook in following if isinstance(hook, MetricsWriter)]
            following = owed + writers if owed else []
        stop.unfinished = False
        if following:
            logger.info("Doing what the stopped run has left of iteration %d.", iteration)
        self.iter = self.storage.iter = iteration
        for hook in following:
            hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    @contextlib.contextmanager
    def _stopping(self, trained: bool) -> Iterator[None]:
        """Leave everything for the run that goes on, in all processes, and end, if that is asked.

        Args:
            trained: whether there is an update that may not be in a checkpoint yet.
        """
        try:
            yield
            return
        except StopRequested as stop:
            reason = stop.reason
        done = self.iter + 1 if trained else self.start_iter
        logger.info("Stopping after %d of %d iterations (%s) ...", done, self.max_iter, reason)
        if trained:
            self.before_checkpoint()
        if comm.is_main_process():
            name = f"model_{self.iter:07d}"
            # or the periodic one of this iteration has been written
            if trained and self.checkpointer.last_saved not in (name, "model_final"):
                self._stop_hook.unfinished = True
                self.checkpointer.save(name, iteration=self.iter)
            self.checkpointer.wait()
            saved = self.checkpointer.last_saved
            last = (
                self.checkpointer.get_checkpoint_file() if saved else self.checkpointer.resumed_from
            )
            _write_marker(done, self.max_iter, reason, last)
            _watch.obeyed()
            logger.warning(
                "Stopped unfinished at iteration %d of %d (%s): --resume goes on from %s.",
                *(done, self.max_iter, reason, last or "the beginning"),
            )
        comm.synchronize()  # a process that ends makes some launchers end the others
        signals.ignore()
        raise Unfinished


def remove_stale_marker() -> None:
    """Nothing that an earlier run has left is to requeue this one. In the first process."""
    if path := os.environ.get(MARKER_VARIABLE):
        Path(path).unlink(missing_ok=True)


def _write_marker(iteration: int, max_iter: int, reason: str, checkpoint: str) -> None:
    path = os.environ.get(MARKER_VARIABLE)
    if not path:
        return
    content = {
        "iteration": iteration,
        "max_iter": max_iter,
        "reason": reason,
        "requeue": reason != REASONS[1],  # who writes STOP wants it to stop
        "checkpoint": checkpoint,
        "time": time.time(),
    }
    write_json(path, content)
