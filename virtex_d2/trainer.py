"""Fine-tuning: detectron2's `DefaultTrainer`, strict about weights, on any device."""

import functools
import logging
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from virtex_d2.checkpoint.transfer import is_backbone_file, load_backbone
from virtex_d2.data.loader import SkipCounter, build_train_loader
from virtex_d2.evaluation import build_evaluator
from virtex_d2.runtime.checkpointer import AtomicDetectionCheckpointer
from virtex_d2.runtime.errors import InputError

logger = logging.getLogger(__name__)


class DetectionTrainer(DefaultTrainer):
    """Trains a detector as the config says.

        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()

    MODEL.WEIGHTS is "" (random), a backbone file (loaded strictly: every backbone tensor or an
    error) or a detector's checkpoint (as detectron2 loads it).
    """

    def __init__(self, cfg: CfgNode):
        autocast_on_cpu = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"
        if autocast_on_cpu:  # detectron2's own mixed precision is for GPUs only
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
        super().__init__(cfg)
        if autocast_on_cpu:
            _autocast_training(getattr(self.model, "module", self.model))
        self.checkpointer = AtomicDetectionCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            trainer=weakref.proxy(self),
        )
        for hook in self._hooks:  # built before the checkpointer was replaced
            if hasattr(hook, "checkpointer"):
                hook.checkpointer = self.checkpointer

    @classmethod
    def evaluate_only(cls, cfg: CfgNode, resume: bool = False) -> dict:
        """Evaluate MODEL.WEIGHTS, or with `resume` the last checkpoint, on DATASETS.TEST.

        Raises:
            InputError: there are no weights of a detector.
        """
        if not resume and (not cfg.MODEL.WEIGHTS or is_backbone_file(cfg.MODEL.WEIGHTS)):
            raise InputError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}: --eval-only needs a detector's checkpoint, "
                "such as OUTPUT_DIR/model_final.pth; a backbone alone detects nothing."
            )
        model = cls.build_model(cfg)
        checkpointer = AtomicDetectionCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        return cls.test(cfg, model)

    @property
    def train_loader(self) -> SkipCounter:
        """The loader that training reads."""
        return self._trainer.data_loader

    def build_hooks(self) -> list[HookBase]:
        built = super().build_hooks()
        built.insert(-1, SkippedImages(self.cfg.VIRTEX.MAX_SKIPPED_SHARE))
        return built

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's last checkpoint, or start from MODEL.WEIGHTS.

        Raises:
            InputError: MODEL.WEIGHTS is missing, unreadable or does not fit.
        """
        if not (resume and self.checkpointer.has_checkpoint()) and is_backbone_file(
            self.cfg.MODEL.WEIGHTS
        ):
            load_backbone(self.model, self.cfg.MODEL.WEIGHTS, self.cfg)
            return
        super().resume_or_load(resume)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> SkipCounter:
        return build_train_loader(cfg)


class SkippedImages(HookBase):
    """Counts the distinct images that could not be decoded; stops the run when there are too many.

    Args:
        max_share: the fraction of the training images that may be skipped.
        period: iterations between exchanges among processes.
    """

    def __init__(self, max_share: float, period: int = 20):
        self._max_share = max_share
        self._period = period

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period and next_iter != self.trainer.max_iter:
            return
        loader = self.trainer.train_loader
        skipped = set().union(*comm.all_gather(loader.skipped))
        self.trainer.storage.put_scalar("images_skipped", len(skipped), smoothing_hint=False)
        limit = self._max_share * loader.num_images
        if len(skipped) > limit:
            raise InputError(
                f"{len(skipped)} of {loader.num_images} training images cannot be decoded, more "
                f"than VIRTEX.MAX_SKIPPED_SHARE allows ({limit:.1f}); the first: "
                f"{', '.join(sorted(skipped)[:10])}. Replace or remove them, or raise "
                "VIRTEX.MAX_SKIPPED_SHARE."
            )


def _autocast_training(model: nn.Module) -> None:
    """Compute the training losses of `model` under bfloat16 autocast, on a CPU."""
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(batched_inputs: list[dict]) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
            return forward(batched_inputs)

    model.forward = wrapped
