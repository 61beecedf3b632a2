"""How a trainer answers `StopRequested`, and how the resumed one goes on from there.

An iteration is an update of the weights and what follows from it: evaluation, checkpoint, export.
A stop comes between the two (`StopHook`), or within an evaluation, which is then abandoned. Its
checkpoint says so, and the resumed run begins with what follows from the last update. So what it
evaluates and keeps is what a run would have that never stopped.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm

from virtex_d2.engine import preemption, signals
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.hooks import MetricsWriter

logger = logging.getLogger(__name__)

MARKER_VARIABLE = "VIRTEX_REQUEUE_MARKER"


class StopHook(HookBase):
    """Stands behind the hooks of an update and before those that follow from it.

    Attributes:
        unfinished: whether the run was loaded from a checkpoint behind whose update nothing was
            done of what follows.
    """

    def __init__(self) -> None:
        self.unfinished = False

    def after_step(self) -> None:
        preemption.check()

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
            preemption.check()
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
        return [hook for hook in following if getattr(hook, "owed", _never)(iteration)]

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
        try:
            yield
        except preemption.StopRequested as stop:
            reason = stop.reason
        else:
            return
        self._stop(reason, trained)

    def _stop(self, reason: str, trained: bool) -> None:
        """Leave everything for the run that goes on, in all processes, and end.

        Args:
            reason: why.
            trained: whether there is an update that may not be in a checkpoint yet.
        """
        done = self.iter + 1 if trained else self.start_iter
        logger.info("Stopping after %d of %d iterations (%s) ...", done, self.max_iter, reason)
        if trained:
            self.before_checkpoint()
        if comm.is_main_process():
            if trained:
                self._save()
            self.checkpointer.wait()
            saved = self.checkpointer.last_saved
            last = (
                self.checkpointer.get_checkpoint_file() if saved else self.checkpointer.resumed_from
            )
            _write_marker(done, self.max_iter, reason, last)
            preemption.obeyed()
            logger.warning(
                "Stopped unfinished at iteration %d of %d (%s): --resume goes on from %s.",
                done,
                self.max_iter,
                reason,
                last or "the beginning",
            )
        comm.synchronize()  # a process that ends makes some launchers end the others
        signals.ignore()
        raise preemption.Unfinished

    def _save(self) -> None:
        """Write the checkpoint, unless the periodic one of this iteration has been written."""
        name = f"model_{self.iter:07d}"
        if self.checkpointer.last_saved not in (name, "model_final"):
            self._stop_hook.unfinished = True
            self.checkpointer.save(name, iteration=self.iter)


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
        "requeue": reason != preemption.REASONS[1],  # who writes STOP wants it to stop
        "checkpoint": checkpoint,
        "time": time.time(),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _never(_: int) -> bool:
    return False
