"""The trainer: updates, hooks and checkpoints of every kind of run, on detectron2's `TrainerBase`.

A run that is stopped or killed anywhere, and resumed, ends with the weights, bit by bit, of one
that was not: random numbers of an iteration are drawn from (SEED, iteration, rank), its batch is
that of its position, and what follows from an update (evaluation, export) is made up for.
"""

import logging
import weakref
from collections.abc import Collection
from typing import Any

from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from yacs.config import CfgNode

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    Retention,
    StateWriter,
)
from virtex_d2.engine.files import stop_where_disk_is_full
from virtex_d2.engine.hooks import MetricsWriter, PeriodicCheckpointer, ProgressPrinter, is_due
from virtex_d2.engine.identity import RunIdentity
from virtex_d2.engine.loop import UpdateLoop
from virtex_d2.engine.run import write_config
from virtex_d2.engine.stopping import StoppableTrainer

logger = logging.getLogger(__name__)


class Trainer(StoppableTrainer):
    """Trains what a subclass builds:

        class MyTrainer(Trainer):
            def __init__(self, cfg):
                super().__init__(cfg, max_iter, periods)
                self.loop = UpdateLoop(model, optimizer, batches, ...)
                self.checkpointer = self.build_checkpointer(AtomicCheckpointer, model, ...)
                self.register_hooks([..., StopHook(), *self.checkpoint_hooks(period), ...])

        trainer = MyTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: of the run, with OUTPUT_DIR; what config.yaml says once more when it is resumed.
        max_iter: iterations, each an update.
        periods: in iterations, of all that is logged, evaluated or kept: the numbers of an update
            are looked at before.

    Attributes:
        cfg: of the run.
        loop: does the updates.
        checkpointer: of `build_checkpointer`.
    """

    loop: UpdateLoop
    checkpointer: AtomicCheckpointer | AtomicDetectionCheckpointer

    def __init__(self, cfg: CfgNode, max_iter: int, periods: Collection[int]):
        TrainerBase.__init__(self)
        self.cfg = self._given_cfg = cfg
        self.max_iter = max_iter
        self._periods = tuple(periods)

    def build_checkpointer(
        self,
        kind: type,
        model: Any,
        *,
        identity: RunIdentity | None = None,
        background: bool = False,
        retention: Retention | None = None,
        **parts: Any,
    ) -> Any:
        """A checkpointer of OUTPUT_DIR, with the trainer's state among what it saves.

        Args:
            identity: refuses a resumed run that is another one.
            background: whether it writes while training goes on.
            **parts: what else has a state, and arguments of `kind`; None: none.
        """
        # first: it refuses before others are confused
        run = {"run": identity} if identity else {}
        return kind(
            model,
            self.cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            writer=StateWriter(background),
            retention=retention,
            **run,
            trainer=weakref.proxy(self),
            **{name: part for name, part in parts.items() if part is not None},
        )

    def checkpoint_hooks(self, period: int) -> list[HookBase]:
        """Write the checkpoints; in the first process alone."""
        if not comm.is_main_process():
            return []
        return [PeriodicCheckpointer(self.checkpointer, period, self.loop.optimizer)]

    def writer_hooks(self, images_per_batch: int, period: int) -> list[HookBase]:
        """Write log, metrics.json and TensorBoard; in the first process alone."""
        if not comm.is_main_process():
            return []
        printer = ProgressPrinter(self.max_iter, images_per_batch)
        return [MetricsWriter(printer, self.cfg.OUTPUT_DIR, period)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's last checkpoint if `resume` and if there is one."""
        if not (resume and self.checkpointer.has_checkpoint()):
            self.load_weights()
            return
        self.checkpointer.resume_or_load("", resume=True)
        write_config(self._given_cfg)
        self.start_iter = self.iter + 1
        logger.info("Resumed after iteration %d.", self.iter)

    def load_weights(self) -> None:
        """Load what a run starts from that does not go on from a checkpoint."""

    def train(self) -> Any:
        """Train from `start_iter` to `max_iter`; return False where that was done before."""
        if self.is_finished():
            logger.info(
                "All %d iterations are done and evaluated: there is nothing to train.",
                self.max_iter,
            )
            return False
        self.loop.start_at(self.start_iter)
        with stop_where_disk_is_full(self.cfg.OUTPUT_DIR):
            TrainerBase.train(self, self.start_iter, self.max_iter)
        return True

    def run_step(self) -> None:
        self.loop.step(self.iter)
        # Also behind the first, in whose update an optimizer makes its state.
        first = self.iter == self.start_iter
        if first or any(is_due(self, period) for period in self._periods):
            self.loop.record(self.storage)

    def before_checkpoint(self) -> None:
        """What all processes do together before a checkpoint that no hook has prepared."""
        self.loop.record(self.storage)
