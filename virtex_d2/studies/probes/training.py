"""Train a classifier, alone on features or with its backbone, on detectron2's loop and hooks.

The batch of an iteration follows from (SEED, iteration) alone, so that a resumed run needs nothing
but weights, optimizer and iteration to go on as if it had not stopped.
"""

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from virtex_d2.engine.checkpointer import AtomicCheckpointer
from virtex_d2.engine.compat import write_metrics
from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.evaluations import MetricsWriter
from virtex_d2.engine.run import write_config
from virtex_d2.studies.probes.features import Classifier, fingerprint, require_untouched

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations, as in detectron2

# First iteration -> endless batches of this process from there on.
Batches = Callable[[int], Iterable[Mapping[str, torch.Tensor]]]


class ClassifierTrainer(TrainerBase):
    """Trains a classifier as SOLVER says, and evaluates it every TEST.EVAL_PERIOD epochs.

        trainer = ClassifierTrainer(cfg, classifier, batches, num_images, evaluate, identity)
        trainer.resume_or_load(resume=True)
        metrics = trainer.train()

    Args:
        cfg: of `get_probe_cfg`.
        model: on its device. Of a frozen one only the linear layer is trained and saved.
        batches: the training data.
        num_images: of an epoch.
        evaluate: (model in evaluation mode) -> metrics by name; called in every process.
        identity: what no resumed run may change, by name; goes into the checkpoints.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: Classifier,
        batches: Batches,
        num_images: int,
        evaluate: Callable[[Classifier], dict[str, float]],
        identity: Mapping[str, Any],
    ):
        super().__init__()
        world_size = comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH % world_size:
            raise InputError(
                f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {world_size} processes "
                "cannot share equally. Start another number of processes, or set it to a multiple "
                "of them."
            )
        self.cfg = cfg
        self.classifier = model
        self.model = wrap_ddp(model)
        self.epoch_length = math.ceil(num_images / cfg.SOLVER.IMS_PER_BATCH)
        self.max_iter = cfg.SOLVER.EPOCHS * self.epoch_length
        self.start_iter = 0
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        )
        self.scheduler = LRMultiplier(self.optimizer, _schedule(cfg), self.max_iter)
        self.metrics: dict[str, float] = {}
        self._batches = batches
        self._evaluate = evaluate
        self._frozen = model.network if model.frozen else None
        self._frozen_before = fingerprint(self._frozen) if self._frozen is not None else ""
        self.checkpointer = AtomicCheckpointer(
            model.fc if model.frozen else model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            run=RunIdentity(identity),  # first: it refuses before others are confused
            trainer=weakref.proxy(self),
            optimizer=self.optimizer,
        )
        self.register_hooks(self._build_hooks())

    def _build_hooks(self) -> list[HookBase | None]:
        cfg, epoch = self.cfg, self.epoch_length
        checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD * epoch
        main = comm.is_main_process()
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            hooks.PeriodicCheckpointer(self.checkpointer, checkpoint_period, max_to_keep=2)
            if main
            else None,
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD * epoch, self.evaluate),
            # last, so that they write what the other hooks found
            MetricsWriter(CommonMetricPrinter(self.max_iter), cfg.OUTPUT_DIR, LOG_PERIOD)
            if main
            else None,
        ]

    def resume_or_load(self, resume: bool) -> None:
        """Continue from OUTPUT_DIR's last checkpoint if `resume` and if there is one."""
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            write_config(self.cfg)
            self.start_iter = self.iter + 1
            logger.info("Resumed after iteration %d of %d.", self.start_iter, self.max_iter)

    def train(self) -> dict[str, float]:
        """Train from `start_iter` to the end.

        Returns:
            The last evaluation's metrics.

        Raises:
            RuntimeError: a frozen network has changed.
        """
        if self.start_iter >= self.max_iter:
            return self.evaluate()
        self._iterator = iter(self._batches(self.start_iter))
        self.model.train()
        super().train(self.start_iter, self.max_iter)
        return self.metrics

    def run_step(self) -> None:
        """One iteration: batch, loss, gradient, update."""
        start = time.perf_counter()
        batch = next(self._iterator)
        data_time = time.perf_counter() - start
        losses = self.model(batch)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise InputError(
                f"The loss became {loss.item()} at iteration {self.iter}. The last checkpoint in "
                f"{self.cfg.OUTPUT_DIR} is from before: lower SOLVER.BASE_LR."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        write_metrics(losses, data_time, self.iter)
        self.optimizer.step()

    def evaluate(self) -> dict[str, float]:
        """Metrics of the present weights. Every process has the first one's norm statistics then.

        Raises:
            RuntimeError: a frozen network has changed.
        """
        if comm.get_world_size() > 1:
            for buffer in self.classifier.buffers():
                dist.broadcast(buffer, 0)
        if self._frozen is not None:
            require_untouched(self._frozen, self._frozen_before)
        self.classifier.eval()
        with torch.no_grad():
            self.metrics = self._evaluate(self.classifier)
        self.classifier.train()
        told = ", ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())
        logger.info("Test: %s", told)
        return self.metrics


class RunIdentity:
    """A checkpoint's part that refuses to go on as another run.

    Args:
        parts: names and values, which torch can save.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self._parts = dict(parts)

    def state_dict(self) -> dict[str, Any]:
        return self._parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise InputError if the checkpoint is of another run; the message names what differs."""
        refuse_other_run(state, self._parts)


def refuse_other_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError if a part of the identity differs; the message names it."""
    differing = [
        f"{name} was {before[name]}, now it is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    if differing:
        raise InputError(
            f"--resume: OUTPUT_DIR holds another run: {'; '.join(differing)}. Resume with what it "
            "began with, or choose another OUTPUT_DIR."
        )


def _schedule(cfg: CfgNode) -> ParamScheduler:
    """The factor on the learning rate, as a function of the fraction of the run that is done."""
    if cfg.SOLVER.SCHEDULE == "cosine":
        return CosineParamScheduler(1.0, 0.0)
    steps = [step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.EPOCHS]
    values = [cfg.SOLVER.GAMMA**count for count in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=cfg.SOLVER.EPOCHS)
