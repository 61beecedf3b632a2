"""Pretraining: `engine.Trainer` with the data, model, validation and export of a method."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from pretrain.backbone import last_scales, require_compiler
from pretrain.config import MAY_CHANGE
from pretrain.data.loader import split_batch
from pretrain.data.sources import open_data
from pretrain.export import load_weights, write_exports
from pretrain.methods.method import find_method
from pretrain.optim import Lookahead, build_lr_scheduler, build_optimizer
from pretrain.validation import check_metric, validate
from virtex_d2.checkpoint.resnet import doubt_of_scale
from virtex_d2.engine.checkpointer import AtomicCheckpointer, Retention
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
from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.safe_load import read_stored
from virtex_d2.engine.scaling import described, origin, scale_to_processes
from virtex_d2.engine.stopping import StopHook
from virtex_d2.engine.trainer import Trainer

logger = logging.getLogger(__name__)

Probe = Callable[[Mapping[str, torch.Tensor], Mapping[str, str]], dict[str, float]]
PROBED = ("probe/mAP", "probe/mAP11")  # what TEST.PROBE records


class PretrainTrainer(Trainer):
    """Pretrains a network by the method that MODEL.OBJECTIVE names.

        trainer = PretrainTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        cfg: of `pretrain.config.load_pretrain_config`, with MODEL.DEVICE resolved.
        with_training_data: False to evaluate only; then no training data is opened.
        build_probe: cfg -> (tensors, metadata) of `export_backbone` -> numbers by name, the highest
            the best; called in all processes. For TEST.PROBE: the tool brings it.
    """

    def __init__(
        self,
        cfg: CfgNode,
        with_training_data: bool = True,
        build_probe: Callable[[CfgNode], Probe] | None = None,
    ):
        scaled = _resolve_sizes(cfg)
        solver, ahead = scaled.SOLVER, scaled.SOLVER.LOOKAHEAD
        test = scaled.TEST.EVAL_PERIOD, scaled.TEST.PROBE.PERIOD
        super().__init__(cfg, solver.MAX_ITER, (cfg.LOG_PERIOD, solver.CHECKPOINT_PERIOD, *test))
        self.cfg = cfg = scaled  # and the run goes on with the one that was given
        self.device = torch.device(cfg.MODEL.DEVICE)
        build = find_method(cfg)
        if solver.ACCUMULATE > 1 and not build.in_passes:
            raise InputError(
                f"SOLVER.ACCUMULATE {solver.ACCUMULATE}: MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE} "
                "sees a batch whole, whose instances it may compare (`Method.in_passes`). Set it "
                "to 1; MODEL.VISUAL.RECOMPUTE blocks saves memory without splitting a batch."
            )
        if cfg.MODEL.VISUAL.COMPILE and with_training_data:
            require_compiler(self.device)
        self.data = open_data(cfg, build.build_samples, with_training_data, build.own_records)
        self.skipped_files: list[str] = []  # of the last batch
        self._exported: tuple[str, ...] = ()  # names; in the first process
        torch.manual_seed(cfg.SEED)
        self.method = build(cfg, self.data.samples.num_outputs).to(self.device)
        self.optimizer = build_optimizer(cfg, self.method.parameter_groups(cfg))
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self._dtype = AMP_DTYPES[solver.AMP.DTYPE] if solver.AMP.ENABLED else None
        self.loop = UpdateLoop(
            wrap_ddp(self.method, self.method.unused_parameters),
            self.optimizer,
            self._batches,
            seed=cfg.SEED,
            prepare=self.method.prepare,
            passes=solver.ACCUMULATE,
            split=split_batch,
            dtype=self._dtype,
            scaler=torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16),
            max_norm=solver.CLIP_GRAD_NORM or None,
            parameters=self.method.parameters(),
            folder=cfg.OUTPUT_DIR,
            advice="lower SOLVER.CNN_LR or SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or "
            "compute in float32 (SOLVER.AMP.ENABLED False)",
        )
        self.lookahead = (
            Lookahead(self.optimizer, ahead.STEPS, ahead.ALPHA) if ahead.ENABLED else None
        )
        self.checkpointer = self.build_checkpointer(
            AtomicCheckpointer,
            self.method,
            identity=RunIdentity(
                {"keys": texts(cfg, but=MAY_CHANGE), "data": self.data.identity()}
            ),
            background=solver.CHECKPOINT_BACKGROUND,
            retention=Retention(solver.CHECKPOINT_KEEP_LAST, solver.CHECKPOINT_KEEP_EVERY),
            after_save=self._export,  # behind it, so that the backbone is one to go on from
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.loop.grad_scaler,
            lookahead=self.lookahead,
        )
        self._probe = None
        if with_training_data and cfg.TEST.PROBE.ROOT:
            self._probe = self._built_probe(build_probe)
        self.register_hooks(self._build_hooks())
        parts = {
            name: sum(p.numel() for p in module.parameters()) / 1e6
            for name, module in self.method.named_children()
        }
        logger.info(
            "%s with %d outputs; parameters in millions (shared ones in each): %s",
            type(self.method).__name__,
            self.data.samples.num_outputs,
            ", ".join(f"{name} {count:.2f}" for name, count in parts.items()),
        )

    def _build_hooks(self) -> list[HookBase]:
        cfg, stream = self.cfg, self.data.stream
        share = cfg.DATA.MAX_SKIPPED_SHARE, "DATA.MAX_SKIPPED_SHARE", cfg.LOG_PERIOD
        images = cfg.SOLVER.IMS_PER_BATCH
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
        metric, probed = cfg.TEST.BEST_METRIC, PROBED if cfg.TEST.PROBE.ROOT else ()
        if self.data.val is None and metric and not (probed and metric.startswith("probe/")):
            raise InputError(
                "TEST.BEST_METRIC needs validation, and neither DATA.VAL_CAPTIONS nor "
                "DATA.VAL_WORDS names data; or TEST.PROBE "
                f"({', '.join(PROBED)})."
            )
        # before the checkpoint: what it says about evaluations is then complete
        if self.data.val is not None:
            built.append(Evaluation(cfg.TEST.EVAL_PERIOD, lambda: {"val": self.evaluate()}, None))
        if self._probe:
            built.append(Evaluation(cfg.TEST.PROBE.PERIOD, self._run_probe, None))
        if metric:
            check_metric(metric, self.method, probed)
            highest = metric.removeprefix("val/") in (*self.method.metrics, *probed)
            built.append(BestCheckpoint(metric, self._keep_best, highest))
        drawn = cfg.TEST.NUM_CAPTIONS if self.data.val is not None else 0
        if comm.is_main_process() and drawn > 0:
            draw = lambda: self.method.pictures(self.data.val, drawn)  # noqa: E731
            built.append(Pictures(cfg.TEST.EVAL_PERIOD, draw))
        # in this order: a run that goes on from the checkpoint does not validate again
        built += self.writer_hooks(images, cfg.LOG_PERIOD)
        return built + self.checkpoint_hooks(cfg.SOLVER.CHECKPOINT_PERIOD)

    def before_checkpoint(self) -> None:
        """Look at all losses so far, and bring together how far all processes have read."""
        super().before_checkpoint()
        if self.data.stream is not None:
            self.data.stream.gather(self.iter + 1)

    def _built_probe(self, build_probe: Callable[[CfgNode], Probe] | None) -> Probe:
        if build_probe is None:
            raise InputError("TEST.PROBE: only tools/pretrain_net.py has it. Leave ROOT empty.")
        if "backbone" not in self.method.export(self.method.state_dict(), self.cfg):
            raise InputError(
                f"TEST.PROBE: MODEL.OBJECTIVE {self.cfg.MODEL.OBJECTIVE} exports no backbone "
                "that could be judged. Leave ROOT empty."
            )
        return build_probe(self.cfg)

    def _run_probe(self) -> dict[str, dict[str, float]]:
        """Judge the present backbone; the run goes on as if it had not been judged."""
        tensors, metadata = self.method.export(self.method.state_dict(), self.cfg)["backbone"]
        with own_randomness(self.cfg.SEED, self.iter, comm.get_rank()):
            results = self._probe(tensors, metadata)
        told = "  ".join(f"{name}: {value:.4g}" for name, value in results.items())
        logger.info("Probe after %d iterations: %s", self.iter + 1, told)
        return {"probe": results}

    def _export(self, checkpoint: Mapping[str, Any], suffix: str = "") -> None:
        exports = self.method.export(checkpoint["model"], self.cfg)
        write_exports(exports, self.cfg, checkpoint["trainer"]["iteration"] + 1, suffix)
        self._exported = tuple(exports)

    def _keep_best(self, iteration: int) -> None:
        """Write the present model beside the periodic checkpoints, which stay the last ones."""
        if comm.is_main_process():
            self.checkpointer.save_beside(
                "model_best",
                then=lambda checkpoint: self._export(checkpoint, "_best"),
                iteration=iteration - 1,
            )

    def load_weights(self) -> None:
        """Start from what the config names, or at random."""
        self.method.load_start(self.cfg, self.data.samples.identity())
        if self.lookahead is not None:
            self.lookahead.restart()  # or the first step would lead half way back

    def load_for_evaluation(self) -> None:
        """Load MODEL.WEIGHTS, else OUTPUT_DIR's last checkpoint; never random weights."""
        # The last one and, should it be damaged, no older one, which would be taken for it.
        path = self.cfg.MODEL.WEIGHTS or self.checkpointer.get_checkpoint_file()
        if not path:
            raise InputError(
                f"There is nothing to evaluate: {self.cfg.OUTPUT_DIR} holds no checkpoint and "
                "MODEL.WEIGHTS is empty."
            )
        load_weights(self.method, read_stored(path), self.data.samples.identity())

    def train(self) -> bool:
        """Train from `start_iter` to SOLVER.MAX_ITER; return False where that was done before."""
        trained = super().train()
        if not trained and comm.is_main_process():
            # A stop between the last checkpoint and the export has left an older one.
            self._export(self.checkpointer.states())
        for name in self._exported:
            path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.safetensors")
            logger.info("The %s is in %s.", name, path)
        if "backbone" in self._exported and (scales := last_scales(self.method)):
            scale = float(torch.cat([s.detach() for s in scales]).abs().median())
            logger.info("Its residual blocks' last norms have scales of %.3g (median).", scale)
            if doubt := doubt_of_scale(scale):
                logger.warning("The backbone: %s.", doubt)
        return trained

    def _batches(self, first: int) -> Iterator[dict]:
        for iteration, batch in enumerate(self.data.train_loader(self.cfg, first), first):
            self.skipped_files = batch["skipped_files"]
            yield {**batch, "iteration": iteration}

    def _measure(self, batch: dict) -> dict[str, tuple[torch.Tensor, int]]:
        ready = self.method.prepare(batch)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return self.method.measure(ready)

    def evaluate(self) -> dict[str, float]:
        """Validate and log it; returns what `pretrain.validation.validate` does."""
        if self.data.val is None:
            raise InputError(
                "There is nothing to evaluate on: neither DATA.VAL_CAPTIONS nor DATA.VAL_WORDS "
                "names data."
            )
        results = validate(self.method, self._measure, self.data, self.cfg)
        if comm.is_main_process():
            logger.info(
                "Validation: %s", "  ".join(f"{name}: {v:.4g}" for name, v in results.items())
            )
        return results


def _resolve_sizes(cfg: CfgNode) -> CfgNode:
    """The config for the processes that there are (`engine.scaling`), and a line in the log."""
    check_amp(cfg)
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE and solver.OPTIMIZER != "sgd":
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE}: rates that grow with the "
            f"batch are a rule for sgd, and SOLVER.OPTIMIZER is {solver.OPTIMIZER}. Set it to 0: "
            "SOLVER.ACCUMULATE keeps batch and rates on fewer processes."
        )
    rates, periods = ("SOLVER.CNN_LR",), ("TEST.PROBE.PERIOD",)
    key = "SOLVER.ACCUMULATE"
    scaled = scale_to_processes(cfg, solver.ACCUMULATE, key, rates, periods)
    solver = scaled.SOLVER
    if solver.MAX_ITER < 1 or solver.WARMUP_ITERS >= solver.MAX_ITER:
        raise InputError(
            f"SOLVER.MAX_ITER {solver.MAX_ITER} must be positive and larger than "
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS}: shorten the warm-up with the run."
        )
    logger.info(
        "An iteration is one update from %s; learning rate %g, of the CNN %g, warm-up %d, %d "
        "iterations%s.",
        described(scaled, solver.ACCUMULATE),
        *(solver.BASE_LR, solver.CNN_LR, solver.WARMUP_ITERS, solver.MAX_ITER),
        origin(scaled, cfg, rates),
    )
    return scaled
