"""Pretraining: `engine.Trainer` with the data, model, validation and export of an objective."""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from pretrain.colors import normalize
from pretrain.compilation import require_compiler
from pretrain.data import caption_counts
from pretrain.data.loader import EveryCaption
from pretrain.device import upload
from pretrain.export import export_backbone
from pretrain.methods.captioning.captioner import can_caption
from pretrain.methods.captioning.model import build_objective, check_objective
from pretrain.methods.captioning.pictures import caption_pictures
from pretrain.methods.captioning.samples import PretrainData, build_data
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.optim import Lookahead, build_lr_scheduler, build_optimizer
from pretrain.validation import check_metric, validate
from pretrain.weights import TOKENIZER_KEY, load_weights
from virtex_d2.engine.checkpointer import AtomicCheckpointer
from virtex_d2.engine.device import AMP_DTYPES, check_amp
from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.hooks import (
    BestCheckpoint,
    Evaluation,
    LearningRate,
    Pictures,
    SkippedImages,
    SkippedSamples,
    StreamCursors,
)
from virtex_d2.engine.identity import RunIdentity, texts
from virtex_d2.engine.loop import UpdateLoop
from virtex_d2.engine.retention import Retention
from virtex_d2.engine.stopping import StopHook
from virtex_d2.engine.trainer import Trainer

logger = logging.getLogger(__name__)


# What may differ between a run's parts: where things are, and what is watched how often. All other
# keys change the weights that the run ends with.
MAY_CHANGE = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "CUDNN_BENCHMARK",
    "TEST.*",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VISUAL.RECOMPUTE",
    "DATA.TRAIN_CAPTIONS",
    "DATA.TRAIN_IMAGES",
    "DATA.TRAIN_LABELS",
    "DATA.TRAIN_SOURCES",
    "DATA.FORMAT",
    "DATA.VAL_*",
    "DATA.TOKENIZER",
    "DATA.VOCAB_SIZE",
    "DATA.INDEX_DIR",
    "DATA.NUM_WORKERS",
    "DATA.MAX_SKIPPED_SHARE",
    "SOLVER.CHECKPOINT_*",
)


class PretrainTrainer(Trainer):
    """Pretrains a backbone on captions as the config says.

        trainer = PretrainTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: of `pretrain.config.get_pretrain_cfg`, with MODEL.DEVICE resolved.
        with_training_data: False to evaluate only; then DATA.TRAIN_CAPTIONS is not opened.
    """

    def __init__(self, cfg: CfgNode, with_training_data: bool = True):
        solver = cfg.SOLVER
        periods = cfg.LOG_PERIOD, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        super().__init__(cfg, solver.MAX_ITER, periods)
        self.device = torch.device(cfg.MODEL.DEVICE)
        _check_sizes(cfg)
        check_objective(cfg)
        if cfg.MODEL.VISUAL.COMPILE and with_training_data:
            require_compiler(self.device)
        self.data = build_data(cfg, with_training_data)
        self.skipped_files: list[str] = []  # of the last batch
        torch.manual_seed(cfg.SEED)
        self.objective = build_objective(cfg, self.data.num_outputs).to(self.device)
        self.optimizer = build_optimizer(cfg, self.objective)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        dtype = AMP_DTYPES[solver.AMP.DTYPE] if solver.AMP.ENABLED else None
        self.loop = UpdateLoop(
            wrap_ddp(self.objective),
            self.optimizer,
            self._batches,
            seed=cfg.SEED,
            prepare=self._prepare,
            dtype=dtype,
            scaler=torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16),
            max_norm=solver.CLIP_GRAD_NORM or None,
            parameters=self.objective.parameters(),
            folder=cfg.OUTPUT_DIR,
            advice="lower SOLVER.CNN_LR or SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or "
            "compute in float32 (SOLVER.AMP.ENABLED False)",
        )
        self.model = self.loop.model
        ahead = solver.LOOKAHEAD
        self.checkpointer = self.build_checkpointer(
            AtomicCheckpointer,
            self.objective,
            identity=run_identity(cfg, self.data),
            background=solver.CHECKPOINT_BACKGROUND,
            retention=Retention(solver.CHECKPOINT_KEEP_LAST, solver.CHECKPOINT_KEEP_EVERY),
            after_save=self._export,  # behind it, so that the backbone is one to go on from
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.loop.grad_scaler,
            lookahead=Lookahead(self.optimizer, ahead.STEPS, ahead.ALPHA)
            if ahead.ENABLED
            else None,
        )
        self.register_hooks(self._build_hooks())
        _log_model(self.objective, self.data)

    def _build_hooks(self) -> list:
        cfg = self.cfg
        share = cfg.DATA.MAX_SKIPPED_SHARE, "DATA.MAX_SKIPPED_SHARE", cfg.LOG_PERIOD
        stream, images = self.data.stream, cfg.SOLVER.IMS_PER_BATCH
        built = [hooks.IterationTimer(), LearningRate(self.scheduler)]
        if stream is None:
            num_images = len(self.data.train.records) if self.data.train else 0
            built.append(SkippedImages(lambda: self.skipped_files, num_images, *share))
        else:
            held = stream.plan.held
            built += [
                SkippedSamples(lambda: self.skipped_files, images, held, *share),
                StreamCursors(stream, cfg.SOLVER.CHECKPOINT_PERIOD),
            ]
        built.append(StopHook())  # what stands behind it is what a resumed run makes up for
        if self.data.val is None and cfg.TEST.BEST_METRIC:
            raise InputError("TEST.BEST_METRIC needs validation: DATA.VAL_CAPTIONS is empty.")
        if self.data.val is not None:
            # before the checkpoint: what it says about validations is then complete
            built.append(Evaluation(cfg.TEST.EVAL_PERIOD, lambda: {"val": self.evaluate()}, None))
            if cfg.TEST.BEST_METRIC:
                check_metric(cfg.TEST.BEST_METRIC, self.objective)
                built.append(BestCheckpoint(cfg.TEST.BEST_METRIC, self._keep_best))
            drawn = comm.is_main_process() and cfg.TEST.NUM_CAPTIONS > 0
            if drawn and can_caption(self.objective):
                built.append(Pictures(cfg.TEST.EVAL_PERIOD, self._draw_captions))
        # in this order: a run that goes on from the checkpoint does not validate again
        built += self.writer_hooks(images, cfg.LOG_PERIOD)
        return built + self.checkpoint_hooks(cfg.SOLVER.CHECKPOINT_PERIOD)

    def before_checkpoint(self) -> None:
        """Look at all losses so far, and bring together how far all processes have read."""
        super().before_checkpoint()
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

    def load_weights(self) -> None:
        """Start from MODEL.WEIGHTS, or at random."""
        if self.cfg.MODEL.WEIGHTS:
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

    def train(self) -> bool:
        """Train from `start_iter` to SOLVER.MAX_ITER; return False where that was done before."""
        trained = super().train()
        if not trained and comm.is_main_process():
            # A stop between the last checkpoint and the export has left an older one.
            self._export(self.checkpointer.states())
        backbone = os.path.join(self.cfg.OUTPUT_DIR, "backbone.safetensors")
        logger.info("The backbone is in %s.", backbone)
        return trained

    def _batches(self, first: int) -> Iterator[dict]:
        for batch in self.data.train_loader(self.cfg, first):
            self.skipped_files = batch["skipped_files"]
            yield batch

    def _prepare(self, batch: dict) -> dict[str, torch.Tensor]:
        on_device = {
            key: upload(value, self.device)
            for key, value in (batch | self.objective.places(batch)).items()
            if isinstance(value, torch.Tensor) and key != "jitter"
        }
        # as the backbone wants pixels: it would move them otherwise
        channels_last = self.cfg.MODEL.VISUAL.CHANNELS_LAST
        layout = torch.channels_last if channels_last else torch.contiguous_format
        on_device["image"] = normalize(on_device["image"], batch.get("jitter"), layout)
        return on_device

    def evaluate(self) -> dict[str, float]:
        """Validate on DATA.VAL_CAPTIONS and log it; what `pretrain.validation.validate` returns."""
        if self.data.val is None:
            raise InputError("DATA.VAL_CAPTIONS is empty: there is nothing to evaluate on.")
        results = validate(self.objective, self.loop.losses, self.data, self.cfg)
        if comm.is_main_process():
            logger.info(
                "Validation: %s", "  ".join(f"{name}: {v:.4g}" for name, v in results.items())
            )
        return results


def run_identity(cfg: CfgNode, data: PretrainData) -> RunIdentity:
    """What a resumed run may not change.

    Data may have moved: not its paths are kept but the vocabulary and how many images and captions
    there are.
    """
    about = {
        TOKENIZER_KEY: data.tokenizer.sha256[:12],
        "outputs": data.num_outputs,
        "read from pipes": data.stream is not None,
    }
    if data.train is not None and data.stream is None:
        about["training images"] = len(data.train.records)
        about["training captions"] = int(caption_counts(data.train.records).sum())
    return RunIdentity({"keys": texts(cfg, but=MAY_CHANGE), "data": about})


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
