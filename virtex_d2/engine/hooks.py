"""When checkpoints are written; for every engine."""

import logging
import sys
from pathlib import Path

import torch
from detectron2.engine import hooks

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    num_bytes,
    numbered_checkpoints,
)
from virtex_d2.engine.files import free_bytes, in_bytes

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's, for checkpointers that write in the background and know what to keep.

    Before the first iteration it says if the disk has too little room for the run's checkpoints.
    An error of a write is raised after the iteration in which it happened, and training ends when
    all is on disk, whether it ends well or not. In the first process alone.

    Args:
        checkpointer, period: of detectron2's.
        optimizer: whose state, before its first step, is not yet there to be measured.
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer | AtomicDetectionCheckpointer,
        period: int,
        optimizer: torch.optim.Optimizer,
    ):
        super().__init__(checkpointer, period)
        self._optimizer = optimizer

    def before_train(self) -> None:
        super().before_train()
        folder = Path(self.checkpointer.save_dir)
        size = num_bytes(self.checkpointer.states()) + _coming_state(self._optimizer)
        count = self.checkpointer.retention.count(
            self.trainer.start_iter, self.trainer.max_iter, self.period
        )
        old = sum(path.stat().st_size for path in numbered_checkpoints(folder).values())
        needed = size * (count + 1)  # and model_final
        if self.checkpointer.retention.last:
            needed -= old  # which give way to new ones
        folder.mkdir(parents=True, exist_ok=True)
        free = free_bytes(folder)
        if needed > free:
            logger.warning(
                "OUTPUT_DIR %s has room for %s, and the %d checkpoints to come take some %s, %s "
                "each. Make room, keep fewer (SOLVER.CHECKPOINT_KEEP_LAST) or write fewer "
                "(SOLVER.CHECKPOINT_PERIOD): the run stops where the disk is full.",
                folder,
                in_bytes(free),
                count + 1,
                in_bytes(needed),
                in_bytes(size),
            )

    def after_step(self) -> None:
        self.checkpointer.writer.check()
        super().after_step()

    def after_train(self) -> None:
        ended_by_error = sys.exc_info()[0] is not None
        try:
            self.checkpointer.wait()
        except Exception as error:
            if not ended_by_error:
                raise
            logger.error("%s", error)  # and the first error goes on its way


def _coming_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer's state will take; 0 once it is there."""
    if optimizer.state:
        return 0
    tensors = 2 if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else 0
    return sum(
        parameter.nbytes * (tensors or bool(group.get("momentum")))
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
