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

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from torch import nn

from virtex_d2.runtime.checkpointer import AtomicCheckpointer
from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_checkpoint
from virtex_d2.runtime.launch import wrap_ddp

from .augment import EvalTransform, TrainTransform, normalize
from .captions import CaptionRecord, load_records
from .export import export_backbone
from .hooks import BackboneExport, LearningRate, PretrainMetricPrinter, SkippedImages
from .loader import CaptionDataset, build_eval_loader, build_train_loader, unigram_entropy
from .objectives import build_objective
from .optim import Lookahead, build_lr_scheduler, build_optimizer
from .textual_head import PADDING
from .tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PretrainTrainer(TrainerBase):
    """Pretrains a backbone on captions as the config says.

        trainer = PretrainTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: of `pretrain.config.get_pretrain_cfg`, with MODEL.DEVICE resolved.
        with_training_data: False to evaluate only; then DATA.TRAIN_CAPTIONS is not opened.

    Raises:
        InputError: the config or the data cannot be used; the message names the key or the record.
    """

    def __init__(self, cfg: CfgNode, with_training_data: bool = True):
        super().__init__()
        self.cfg = cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.max_iter = cfg.SOLVER.MAX_ITER
        _check_sizes(cfg)

        train_records = _records(cfg, "TRAIN") if with_training_data else []
        val_records = _records(cfg, "VAL") if cfg.DATA.VAL_CAPTIONS else []
        self.tokenizer = load_or_train_tokenizer(cfg, train_records)
        self.train_data = (
            CaptionDataset(
                train_records,
                self.tokenizer,
                _train_transform(cfg),
                cfg.MODEL.TEXTUAL.MAX_LENGTH,
                cfg.SEED,
            )
            if with_training_data
            else None
        )
        self.val_data = (
            CaptionDataset(
                val_records,
                self.tokenizer,
                EvalTransform(cfg.DATA.IMAGE_SIZE),
                cfg.MODEL.TEXTUAL.MAX_LENGTH,
                cfg.SEED,
            )
            if val_records
            else None
        )

        torch.manual_seed(cfg.SEED)
        self.objective = build_objective(cfg, self.tokenizer.vocab_size).to(self.device)
        self.model = wrap_ddp(self.objective)
        self.optimizer = build_optimizer(cfg, self.objective)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.amp_dtype = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE]
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
            trainer=weakref.proxy(self),
            **state,
        )
        self.register_hooks(self._build_hooks())
        _log_model(self.objective, self.tokenizer)

    def _build_hooks(self) -> list:
        cfg = self.cfg
        main = comm.is_main_process()
        built = [
            hooks.IterationTimer(),
            LearningRate(self.scheduler),
            SkippedImages(
                len(self.train_data.records) if self.train_data else 0,
                cfg.DATA.MAX_SKIPPED_SHARE,
                cfg.LOG_PERIOD,
            ),
        ]
        if main:
            built += [
                hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
                BackboneExport(
                    self.objective.visual,
                    cfg,
                    self._backbone_path(),
                    cfg.SOLVER.CHECKPOINT_PERIOD,
                ),
            ]
        if self.val_data is not None:
            built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if main:
            writers = [
                PretrainMetricPrinter(self.max_iter, cfg.SOLVER.IMS_PER_BATCH),
                JSONWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json")),
                TensorboardXWriter(cfg.OUTPUT_DIR),
            ]
            built.append(hooks.PeriodicWriter(writers, cfg.LOG_PERIOD))
        return built

    def _backbone_path(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, "backbone.safetensors")

    def resume_or_load(self, resume: bool) -> None:
        """Continue from OUTPUT_DIR's last checkpoint, or start from MODEL.WEIGHTS or at random.

        Raises:
            InputError: MODEL.WEIGHTS is missing, unreadable, or of another model.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            self.start_iter = self.iter + 1
            logger.info("Resumed after iteration %d.", self.iter)
        elif self.cfg.MODEL.WEIGHTS:
            load_weights(self.objective, self.cfg.MODEL.WEIGHTS)

    def load_for_evaluation(self) -> None:
        """MODEL.WEIGHTS, else OUTPUT_DIR's last checkpoint; never random weights.

        Raises:
            InputError: there is neither, or the file is not of this model.
        """
        path = self.cfg.MODEL.WEIGHTS
        if not path and self.checkpointer.has_checkpoint():
            path = self.checkpointer.get_checkpoint_file()
        if not path:
            raise InputError(
                f"There is nothing to evaluate: {self.cfg.OUTPUT_DIR} holds no checkpoint and "
                "MODEL.WEIGHTS is empty."
            )
        load_weights(self.objective, path)

    def train(self) -> None:
        """Train from `start_iter` to SOLVER.MAX_ITER; a run that is finished is left as it is."""
        if self.start_iter >= self.max_iter:
            logger.info("All %d iterations are done: there is nothing to train.", self.max_iter)
            if comm.is_main_process():
                # A stop between the last checkpoint and the export has left an older one.
                path = self._backbone_path()
                export_backbone(self.objective.visual, self.cfg, self.start_iter, path)
            return
        loader = build_train_loader(
            self.train_data,
            self.cfg.SOLVER.IMS_PER_BATCH,
            start_iteration=self.start_iter,
            num_workers=self.cfg.DATA.NUM_WORKERS,
        )
        self._batches = iter(loader)
        self.model.train()
        super().train(self.start_iter, self.max_iter)

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        # dropout of an iteration does not depend on what was drawn before it
        torch.manual_seed(_seed(self.cfg.SEED, self.iter, comm.get_rank()))
        losses = self._losses(batch)
        total = sum(losses.values())
        if not torch.isfinite(total):
            raise InputError(
                f"The loss became {total.item()} at iteration {self.iter} "
                f"({ {k: round(v.item(), 3) for k, v in losses.items()} }). The last checkpoint in "
                f"{self.cfg.OUTPUT_DIR} is from before: lower SOLVER.CNN_LR or SOLVER.BASE_LR, or "
                "lengthen SOLVER.WARMUP_ITERS."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if self.cfg.SOLVER.CLIP_GRAD_NORM > 0:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(
                self.objective.parameters(), self.cfg.SOLVER.CLIP_GRAD_NORM
            )
            self.storage.put_scalar("grad_norm", norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        SimpleTrainer.write_metrics(losses, data_time)
        self.skipped_files = batch["skipped_files"]

    def _losses(self, batch: dict) -> dict[str, torch.Tensor]:
        on_device = {
            key: value.to(self.device, non_blocking=True)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        on_device["image"] = normalize(on_device["image"])
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
            return self.model(on_device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Mean loss (nats a predicted token) and perplexity on the validation captions.

        Returns:
            {"val": {"loss", "loss_<direction>", "perplexity_<direction>", "unigram_entropy",
            "images_skipped"}}; the unigram entropy of the same captions is what a model that knows
            the words' frequencies and nothing else would reach.
        """
        if self.val_data is None:
            raise InputError("DATA.VAL_CAPTIONS is empty: there is nothing to evaluate on.")
        training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        predicted = skipped = 0
        loader = build_eval_loader(
            self.val_data, self.cfg.TEST.IMS_PER_BATCH, self.cfg.DATA.NUM_WORKERS
        )
        for batch in loader:
            skipped += int(batch["num_skipped"])
            count = int((batch["caption_tokens"][:, 1:] != PADDING).sum())
            if not count:
                continue
            for name, loss in self._losses(batch).items():
                sums[name] = sums.get(name, 0.0) + loss.item() * count
            predicted += count
        self.model.train(training)

        gathered = comm.all_gather((sums, predicted, skipped))
        predicted = sum(part[1] for part in gathered)
        if not predicted:
            raise InputError(
                f"{self.cfg.DATA.VAL_CAPTIONS}: none of its images in {self.cfg.DATA.VAL_IMAGES} "
                "can be decoded, so that there is nothing to validate on. Replace them."
            )
        names = dict.fromkeys(name for part in gathered for name in part[0])
        losses = {
            name: sum(part[0].get(name, 0.0) for part in gathered) / predicted for name in names
        }
        results = {"loss": sum(losses.values()), **losses}
        for name, loss in losses.items():
            results[name.replace("loss", "perplexity", 1)] = math.exp(min(loss, 50.0))
        results["unigram_entropy"] = unigram_entropy(self.val_data)
        results["images_skipped"] = sum(part[2] for part in gathered)
        if comm.is_main_process():
            logger.info(
                "Validation: %s", "  ".join(f"{name}: {v:.4g}" for name, v in results.items())
            )
        return {"val": results}


def load_or_train_tokenizer(cfg: CfgNode, records: list[CaptionRecord]) -> Tokenizer:
    """DATA.TOKENIZER, else that of OUTPUT_DIR's checkpoint, else one trained on the captions.

    Raises:
        InputError: there is neither a tokenizer nor captions to train one, or the captions are too
            few for DATA.VOCAB_SIZE.
    """
    if cfg.DATA.TOKENIZER:
        return Tokenizer(cfg.DATA.TOKENIZER)
    path = os.path.join(cfg.OUTPUT_DIR, "tokenizer.model")
    has_checkpoint = os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if not (has_checkpoint and os.path.isfile(path)):
        if not records:
            raise InputError(
                f"{path}: expected the tokenizer of a checkpoint in this folder, found none. Give "
                "the one that the model was trained with as DATA.TOKENIZER."
            )
        if comm.is_main_process():  # also where a run that never saved left one behind
            captions = (caption for record in records for caption in record.captions)
            train_tokenizer(captions, cfg.DATA.VOCAB_SIZE, path)
        comm.synchronize()
    return Tokenizer(path)


def load_weights(objective: nn.Module, path: str) -> None:
    """Every tensor of a pretraining checkpoint (ours or VirTex's) into the objective.

    Raises:
        InputError: the file is missing or unreadable, or a tensor is missing, left over or of
            another shape.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = objective.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(
            f"MODEL.WEIGHTS {path} is not of this model (MODEL.OBJECTIVE "
            f"{type(objective).__name__}): {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Nothing was loaded. MODEL.VISUAL.NAME, MODEL.TEXTUAL.* "
            "and the tokenizer must be those of the checkpoint."
        )
    objective.load_state_dict(state)
    logger.info("Loaded all %d tensors of %s.", len(own), path)


def _records(cfg: CfgNode, split: str) -> list[CaptionRecord]:
    captions, images = cfg.DATA[f"{split}_CAPTIONS"], cfg.DATA[f"{split}_IMAGES"]
    if not captions:
        raise InputError(
            f"DATA.{split}_CAPTIONS is empty: name the annotation file, and DATA.{split}_IMAGES "
            "its folder of images."
        )
    records = load_records(cfg.DATA.FORMAT, captions, images)
    logger.info(
        "%s: %d images, %d captions.",
        captions,
        len(records),
        sum(len(record.captions) for record in records),
    )
    return records


def _train_transform(cfg: CfgNode) -> TrainTransform:
    data = cfg.DATA
    return TrainTransform(
        data.IMAGE_SIZE,
        scale=tuple(data.CROP_SCALE),
        ratio=tuple(data.CROP_RATIO),
        flip=data.FLIP_PROB,
        jitter=tuple(data.COLOR_JITTER),
        jitter_prob=data.COLOR_JITTER_PROB,
    )


def _check_sizes(cfg: CfgNode) -> None:
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise InputError(
            f"SOLVER.AMP.DTYPE: {cfg.SOLVER.AMP.DTYPE!r} is not one of {', '.join(AMP_DTYPES)}."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise InputError(
            "SOLVER.AMP.DTYPE float16 needs a GPU: on a CPU use bfloat16, or SOLVER.AMP.ENABLED "
            "False."
        )
    if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not a multiple of the "
            f"{comm.get_world_size()} processes."
        )
    if cfg.SOLVER.MAX_ITER < 1 or cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
        raise InputError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} must be positive and larger than "
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS}."
        )


def _seed(seed: int, iteration: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1)


def _log_model(objective: nn.Module, tokenizer: Tokenizer) -> None:
    parameters = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in objective.named_children()
    }
    logger.info(
        "Objective %s with %d pieces; parameters in millions (shared ones in each): %s",
        type(objective).__name__,
        tokenizer.vocab_size,
        ", ".join(f"{name} {count:.2f}" for name, count in parameters.items()),
    )
