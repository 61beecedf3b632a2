"""Train a classifier, alone on features or with its backbone, by `engine.Trainer`."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from virtex_d2.engine.checkpointer import AtomicCheckpointer, Retention
from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.frozen import fingerprint, require_untouched
from virtex_d2.engine.hooks import Evaluation
from virtex_d2.engine.identity import RunIdentity
from virtex_d2.engine.loop import UpdateLoop, share_of
from virtex_d2.engine.stopping import StopHook
from virtex_d2.engine.trainer import Trainer
from virtex_d2.studies.probes.features import Classifier

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations, as in detectron2

# First iteration -> endless batches of this process from there on.
Batches = Callable[[int], Iterable[Mapping[str, torch.Tensor]]]


class ClassifierTrainer(Trainer):
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
        epoch = math.ceil(num_images / cfg.SOLVER.IMS_PER_BATCH)
        periods = cfg.SOLVER.CHECKPOINT_PERIOD * epoch, cfg.TEST.EVAL_PERIOD * epoch, LOG_PERIOD
        super().__init__(cfg, cfg.SOLVER.EPOCHS * epoch, periods)
        share_of(cfg.SOLVER.IMS_PER_BATCH)
        self.classifier = model
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        )
        self.scheduler = LRMultiplier(self.optimizer, _schedule(cfg), self.max_iter)
        self.metrics: dict[str, float] = {}
        self._evaluate = evaluate
        self._frozen = model.network if model.frozen else None
        self._frozen_before = fingerprint(self._frozen) if self._frozen is not None else ""
        self.loop = UpdateLoop(
            wrap_ddp(model), self.optimizer, batches, seed=cfg.SEED, folder=cfg.OUTPUT_DIR
        )
        self.checkpointer = self.build_checkpointer(
            AtomicCheckpointer,
            model.fc if model.frozen else model,
            identity=RunIdentity(identity),
            retention=Retention(last=2),
            optimizer=self.optimizer,
        )
        checkpoint_period, evaluation_period, _ = periods
        self.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(),
                StopHook(),
                *self.checkpoint_hooks(checkpoint_period),
                Evaluation(evaluation_period, self.evaluate, cfg.OUTPUT_DIR),
                *self.writer_hooks(cfg.SOLVER.IMS_PER_BATCH, LOG_PERIOD),
            ]
        )

    def train(self) -> dict[str, float]:
        """Train from `start_iter` to the end, and return the last evaluation's metrics.

        Raises:
            RuntimeError: a frozen network has changed.
        """
        super().train()
        return self.metrics or self.evaluate()

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


def _schedule(cfg: CfgNode) -> ParamScheduler:
    """The factor on the learning rate, as a function of the fraction of the run that is done."""
    if cfg.SOLVER.SCHEDULE == "cosine":
        return CosineParamScheduler(1.0, 0.0)
    steps = [step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.EPOCHS]
    values = [cfg.SOLVER.GAMMA**count for count in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=cfg.SOLVER.EPOCHS)
