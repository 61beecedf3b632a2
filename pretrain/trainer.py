"""The pretraining loop, on detectron2's `TrainerBase`.

The loop takes a batch, a loss and a step. Logging, schedule, checkpoints, export and validation
are hooks. Random numbers of an iteration are drawn from (SEED, iteration, rank) and its batch from
the position, so that a resumed run needs nothing but model, optimizer and iteration to go on as if
it had not stopped.
"""

import logging
import math
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from pretrain.colors import normalize
from pretrain.compilation import require_compiler
from pretrain.data.loader import EveryCaption
from pretrain.device import Readings, upload
from pretrain.export import export_backbone
from pretrain.hooks import (
    BestCheckpoint,
    CaptionPictures,
    LearningRate,
    PretrainMetricPrinter,
    SkippedImages,
    SkippedSamples,
    StreamCursors,
    Validation,
    is_due,
)
from pretrain.identity import RunIdentity
from pretrain.methods.captioning.captioner import can_caption
from pretrain.methods.captioning.model import build_objective, check_objective
from pretrain.methods.captioning.pictures import caption_pictures
from pretrain.methods.captioning.samples import PretrainData, build_data
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.optim import Lookahead, build_lr_scheduler, build_optimizer, step_where_finite
from pretrain.validation import check_metric, validate
from pretrain.weights import load_weights
from virtex_d2.engine.checkpointer import AtomicCheckpointer, Retention, StateWriter, has_checkpoint
from virtex_d2.engine.device import AMP_DTYPES, check_amp
from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.evaluations import MetricsWriter
from virtex_d2.engine.files import stop_where_disk_is_full
from virtex_d2.engine.hooks import PeriodicCheckpointer
from virtex_d2.engine.randomness import place_seed
from virtex_d2.engine.run import write_config
from virtex_d2.engine.stopping import StopHook, StoppableTrainer

logger = logging.getLogger(__name__)


class PretrainTrainer(StoppableTrainer):
    """Pretrains a backbone on captions as the config says.

        trainer = PretrainTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: of `pretrain.config.get_pretrain_cfg`, with MODEL.DEVICE resolved.
        with_training_data: False to evaluate only; then DATA.TRAIN_CAPTIONS is not opened.
    """

    def __init__(self, cfg: CfgNode, with_training_data: bool = True):
        super().__init__()
        self.cfg = cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.max_iter = cfg.SOLVER.MAX_ITER
        _check_sizes(cfg)
        check_objective(cfg)
        if cfg.MODEL.VISUAL.COMPILE and with_training_data:
            require_compiler(self.device)
        self.data = build_data(cfg, with_training_data)
        torch.manual_seed(cfg.SEED)
        self.objective = build_objective(cfg, self.data.num_outputs).to(self.device)
        self.model = wrap_ddp(self.objective)
        self.optimizer = build_optimizer(cfg, self.objective)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.amp_dtype = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE]
        # as the backbone wants pixels: it would move them otherwise
        self._layout = (
            torch.channels_last if cfg.MODEL.VISUAL.CHANNELS_LAST else torch.contiguous_format
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            enabled=cfg.SOLVER.AMP.ENABLED and self.amp_dtype == torch.float16,
        )
        state = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        if cfg.SOLVER.LOOKAHEAD.ENABLED:
            state["lookahead"] = Lookahead(
                self.optimizer, cfg.SOLVER.LOOKAHEAD.STEPS, cfg.SOLVER.LOOKAHEAD.ALPHA
            )
        self.checkpointer = AtomicCheckpointer(
            self.objective,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            writer=StateWriter(cfg.SOLVER.CHECKPOINT_BACKGROUND),
            retention=Retention(cfg.SOLVER.CHECKPOINT_KEEP_LAST, cfg.SOLVER.CHECKPOINT_KEEP_EVERY),
            after_save=self._export,  # behind it, so that the backbone is one to go on from
            run=RunIdentity(cfg, self.data),  # first: it refuses before others are confused
            trainer=weakref.proxy(self),
            **state,
        )
        self.register_hooks(self._build_hooks())
        self._readings = Readings(self._check)
        _log_model(self.objective, self.data)

    def _build_hooks(self) -> list:
        cfg = self.cfg
        main = comm.is_main_process()
        built = [
            hooks.IterationTimer(),
            LearningRate(self.scheduler),
        ]
        if self.data.stream is None:
            num_images = len(self.data.train.records) if self.data.train else 0
            built.append(SkippedImages(num_images, cfg.DATA.MAX_SKIPPED_SHARE, cfg.LOG_PERIOD))
        else:
            built += [
                SkippedSamples(
                    cfg.SOLVER.IMS_PER_BATCH,
                    self.data.stream.plan.held,
                    cfg.DATA.MAX_SKIPPED_SHARE,
                    cfg.LOG_PERIOD,
                ),
                StreamCursors(self.data.stream, cfg.SOLVER.CHECKPOINT_PERIOD),
            ]
        built.append(StopHook())  # what stands behind it is what a resumed run makes up for
        if self.data.val is None and cfg.TEST.BEST_METRIC:
            raise InputError("TEST.BEST_METRIC needs validation: DATA.VAL_CAPTIONS is empty.")
        if self.data.val is not None:
            # before the checkpoint: what it says about validations is then complete
            built.append(Validation(cfg.TEST.EVAL_PERIOD, self.evaluate))
            if cfg.TEST.BEST_METRIC:
                check_metric(cfg.TEST.BEST_METRIC, self.objective)
                built.append(BestCheckpoint(cfg.TEST.BEST_METRIC, self._keep_best))
            if main and cfg.TEST.NUM_CAPTIONS > 0 and can_caption(self.objective):
                built.append(CaptionPictures(cfg.TEST.EVAL_PERIOD, self._draw_captions))
        if main:
            printer = PretrainMetricPrinter(self.max_iter, cfg.SOLVER.IMS_PER_BATCH)
            built += [
                # before the checkpoint: a run that goes on from there does not validate again
                MetricsWriter(printer, cfg.OUTPUT_DIR, cfg.LOG_PERIOD),
                PeriodicCheckpointer(
                    self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, self.optimizer
                ),
            ]
        return built

    def before_checkpoint(self) -> None:
        """Look at all losses so far, and bring together how far all processes have read."""
        self._readings.record(self.storage)
        if self.data.stream is not None:
            self.data.stream.gather(self.iter + 1)

    def _export(self, checkpoint: Mapping[str, Any], name: str = "backbone") -> None:
        """Write OUTPUT_DIR/<name>.safetensors, the backbone in a checkpoint."""
        path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.safetensors")
        done = checkpoint["trainer"]["iteration"] + 1
        export_backbone(checkpoint["model"], self.cfg, done, path)

    def _keep_best(self, iteration: int) -> None:
        """Write the present model beside the periodic checkpoints, which stay the last ones."""
        if comm.is_main_process():
            self.checkpointer.save_beside(
                "model_best",
                then=lambda checkpoint: self._export(checkpoint, "backbone_best"),
                iteration=iteration - 1,
            )

    def _draw_captions(self) -> list[tuple[str, np.ndarray]]:
        """Pictures of TEST.NUM_CAPTIONS validation images, the same ones every time."""
        images = EveryCaption(self.data.val, one_caption=True)
        samples = (images[i] for i in range(min(self.cfg.TEST.NUM_CAPTIONS, len(images))))
        decodable = [sample for sample in samples if "image" in sample]
        return caption_pictures(self.objective, self.data.tokenizer, decodable)

    def resume_or_load(self, resume: bool) -> None:
        """Continue from OUTPUT_DIR's last checkpoint, or start from MODEL.WEIGHTS or at random."""
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            write_config(self.cfg)
            self.start_iter = self.iter + 1
            logger.info("Resumed after iteration %d.", self.iter)
        elif self.cfg.MODEL.WEIGHTS:
            load_weights(self.objective, self.cfg.MODEL.WEIGHTS, self._words)

    @property
    def _words(self) -> Tokenizer | None:
        """The tokenizer of an objective whose outputs are its pieces; labels need none."""
        words = self.cfg.MODEL.OBJECTIVE != "multilabel_classification"
        return self.data.tokenizer if words else None

    def load_for_evaluation(self) -> None:
        """MODEL.WEIGHTS, else OUTPUT_DIR's last checkpoint; never random weights."""
        # The last one and, should it be damaged, no older one, which would be taken for it.
        path = self.cfg.MODEL.WEIGHTS or self.checkpointer.get_checkpoint_file()
        if not path:
            raise InputError(
                f"There is nothing to evaluate: {self.cfg.OUTPUT_DIR} holds no checkpoint and "
                "MODEL.WEIGHTS is empty."
            )
        load_weights(self.objective, path, self._words)

    def train(self) -> None:
        """Train from `start_iter` to SOLVER.MAX_ITER; a run that is finished is left as it is."""
        if self.is_finished():
            logger.info("All %d iterations are done: there is nothing to train.", self.max_iter)
            if comm.is_main_process():
                # A stop between the last checkpoint and the export has left an older one.
                self._export(self.checkpointer.states())
            return
        self._batches = iter(self.data.train_loader(self.cfg, self.start_iter))
        self.model.train()
        folder = self.cfg.OUTPUT_DIR
        with stop_where_disk_is_full(folder):
            super().train(self.start_iter, self.max_iter)
        logger.info("The backbone is in %s.", os.path.join(folder, "backbone.safetensors"))

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        # dropout of an iteration does not depend on what was drawn before it
        torch.manual_seed(place_seed(self.cfg.SEED, self.iter, comm.get_rank()))
        losses = self._losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            self.objective.parameters(), self.cfg.SOLVER.CLIP_GRAD_NORM or math.inf
        )
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            step_where_finite(self.optimizer, norm)
        self._readings.take(self.iter, data_time, {**losses, "grad_norm": norm})
        # what is logged, evaluated or kept of an iteration is behind a look at its numbers; so is
        # all behind the first, in whose update an optimizer makes its state
        periods = self.cfg.LOG_PERIOD, self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD
        if self.iter == self.start_iter or any(is_due(self, period) for period in periods):
            self._readings.record(self.storage)
        self.skipped_files = batch["skipped_files"]

    def _check(self, iteration: int, numbers: dict[str, float]) -> None:
        """Raise InputError if a loss is not finite, or the gradients are not and no scaler is there
        for that.
        """
        scaled = self.scaler.is_enabled()
        if all(map(math.isfinite, (v for k, v in numbers.items() if "loss" in k or not scaled))):
            return
        found = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        folder = self.cfg.OUTPUT_DIR
        kept = f"The last checkpoint in {folder} is from before"
        kept = kept if has_checkpoint(folder) else f"{folder} has no checkpoint yet"
        raise InputError(
            f"Losses or gradients are not finite at iteration {iteration}: {found}. "
            f"{kept}: lower SOLVER.CNN_LR or SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or "
            "compute in float32 (SOLVER.AMP.ENABLED False)."
        )

    def _losses(self, batch: dict) -> dict[str, torch.Tensor]:
        on_device = {
            key: upload(value, self.device)
            for key, value in (batch | self.objective.places(batch)).items()
            if isinstance(value, torch.Tensor) and key != "jitter"
        }
        on_device["image"] = normalize(on_device["image"], batch.get("jitter"), self._layout)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
            return self.model(on_device)

    def evaluate(self) -> dict[str, float]:
        """Validate on DATA.VAL_CAPTIONS and log it; what `pretrain.validation.validate` returns."""
        if self.data.val is None:
            raise InputError("DATA.VAL_CAPTIONS is empty: there is nothing to evaluate on.")
        results = validate(self.objective, self._losses, self.data, self.cfg)
        if comm.is_main_process():
            logger.info(
                "Validation: %s", "  ".join(f"{name}: {v:.4g}" for name, v in results.items())
            )
        return results


def _check_sizes(cfg: CfgNode) -> None:
    check_amp(cfg)
    images, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if images % processes:
        near = sorted(
            {max(images // processes, 1) * processes, -(-images // processes) * processes}
        )
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {images} is not a multiple of the {processes} processes, which "
            "share it equally. Start another number of processes, or set it to "
            f"{' or '.join(map(str, near))}."
        )
    if cfg.SOLVER.MAX_ITER < 1 or cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
        raise InputError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} must be positive and larger than "
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS}: shorten the warm-up with the run."
        )


def _log_model(objective: nn.Module, data: PretrainData) -> None:
    parameters = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in objective.named_children()
    }
    logger.info(
        "Objective %s with %d outputs; parameters in millions (shared ones in each): %s",
        type(objective).__name__,
        data.num_outputs,
        ", ".join(f"{name} {count:.2f}" for name, count in parameters.items()),
    )
