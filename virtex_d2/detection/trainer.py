"""Fine-tuning: detectron2's `DefaultTrainer` with strict weights, safe checkpoints, any device."""

import logging
import os
import traceback
from collections import OrderedDict
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from virtex_d2.checkpoint.source import Source
from virtex_d2.checkpoint.starts import start_at_random
from virtex_d2.checkpoint.transfer import (
    backbone_names,
    config_preprocessing,
    load_backbone,
    open_weights,
)
from virtex_d2.detection.averages import ExportEMA, PreciseBN, UpdateEMA, WeightEMA
from virtex_d2.detection.batch import (
    LRScheduler,
    build_loop,
    check_augmented_evaluation,
    check_training,
    clips_full_model,
    resolve_batch,
    split_groups,
)
from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.evaluation import build_evaluator
from virtex_d2.detection.loader import TestLoader, TrainLoader, build_train_loader
from virtex_d2.engine.checkpointer import Retention
from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.hooks import Evaluation, SkippedImages
from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.stopping import StopHook, settled
from virtex_d2.engine.trainer import Trainer

logger = logging.getLogger(__name__)


class DetectionTrainer(Trainer, DefaultTrainer):
    """Trains a detector as the config says.

        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()

    MODEL.WEIGHTS is a start of `checkpoint.starts` ("" is random), a checkpoint with a ResNet
    (loaded strictly: every backbone tensor or an error, and it must compute what it computed) or a
    detector's checkpoint. An iteration is an update of the optimizer, whatever number of passes it
    takes (VIRTEX.ACCUMULATE).

    Args:
        cfg: with MODEL.DEVICE and norms resolved; its data sets registered.

    Attributes:
        cfg: scaled to the number of processes, with SOLVER.REFERENCE_WORLD_SIZE.
        ema: the average of the weights; None without VIRTEX.EMA.
    """

    def __init__(self, cfg: CfgNode):
        check_training(cfg)
        scaled = resolve_batch(cfg)
        virtex, solver = scaled.VIRTEX, scaled.SOLVER
        periods = virtex.LOG_PERIOD, solver.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD
        # Not DefaultTrainer's own: that opens metrics.json before the weights are known to load,
        # and its mixed precision is for GPUs only.
        super().__init__(cfg, solver.MAX_ITER, periods)
        self.cfg = cfg = scaled  # and the run goes on with the one that was given
        model = self.build_model(cfg)
        self.ema = WeightEMA(model, virtex.EMA.DECAY) if virtex.EMA.ENABLED else None
        optimizer = self.build_optimizer(cfg, model)
        self._data_loader = self.build_train_loader(cfg)
        self.loop = build_loop(cfg, wrap_ddp(model), optimizer, self._data_loader.start_at)
        self._trainer = self.loop  # detectron2's name: it has the model and the optimizer
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(
            DetectorCheckpointer,
            self.model,
            background=solver.CHECKPOINT_BACKGROUND,
            retention=Retention(solver.CHECKPOINT_KEEP_LAST, solver.CHECKPOINT_KEEP_EVERY),
            preprocessing=config_preprocessing(cfg),
            ema=self.ema,
        )
        self._last_eval_results: dict = OrderedDict()
        self.register_hooks(self.build_hooks())

    @property
    def data_loader(self) -> TrainLoader:
        """The training images."""
        return self._data_loader

    @classmethod
    def evaluate_only(
        cls, cfg: CfgNode, resume: bool = False, source: Source | None = None
    ) -> dict:
        """Evaluate MODEL.WEIGHTS, or with `resume` the last checkpoint, on DATASETS.TEST.

        With VIRTEX.EMA.ENABLED and EVALUATE that is the average which the checkpoint holds.
        """
        check_augmented_evaluation(cfg)
        model = cls.build_model(cfg)
        averaged = cfg.VIRTEX.EMA.ENABLED and cfg.VIRTEX.EMA.EVALUATE
        checkpointer = DetectorCheckpointer(model, cfg.OUTPUT_DIR, whole=True, averaged=averaged)
        weights = cfg.MODEL.WEIGHTS
        # The last one and, should it be damaged, no older one: whose results would be taken for it.
        last = checkpointer.get_checkpoint_file() if resume else ""
        source = source or open_weights(cfg, resume)
        if not last and (source is None or not source.is_detector):
            raise InputError(
                f"MODEL.WEIGHTS {weights!r}: --eval-only needs a detector's checkpoint, such as "
                "OUTPUT_DIR/model_final.pth, or --resume and one in OUTPUT_DIR; a backbone alone "
                "detects nothing."
            )
        checkpointer.opened = source and source.stored
        checkpointer.load(last or source.path, checkpointables=[])
        if averaged:
            logger.info("What is evaluated is the moving average of the checkpoint's weights.")
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    def resume_or_load(self, resume: bool = True, source: Source | None = None) -> None:
        """Continue from OUTPUT_DIR's last checkpoint if `resume`, else start from MODEL.WEIGHTS.

        Args:
            resume: whether to continue.
            source: the file, where it is open already.
        """
        self._source = source or open_weights(self.cfg, resume)
        self.checkpointer.opened = self._source and self._source.stored
        super().resume_or_load(resume)
        self._source = None

    def load_weights(self) -> None:
        """Load MODEL.WEIGHTS, a backbone or a detector, or start at random."""
        if self._source is None:
            start_at_random(self.checkpointer.model, self.cfg.MODEL.WEIGHTS)
            return
        if self._source.is_detector:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            return
        report = load_backbone(self.model, self._source, self.cfg)
        if comm.is_main_process():
            report.write(self.cfg.OUTPUT_DIR)

    def train(self) -> dict | None:
        """Train to SOLVER.MAX_ITER; a run that is finished is left as it is.

        Returns:
            The last evaluation's results where TEST.EXPECTED_RESULTS asks for a check of them.
        """
        if not super().train():
            logger.info("--eval-only evaluates once more.")
        elif self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
            return self._last_eval_results
        return None

    def state_dict(self) -> dict:
        """Iteration, schedule (of its hook), optimizer and scaler, and what an iteration is."""
        state = TrainerBase.state_dict(self)
        return {
            **state,
            "_trainer": {"iteration": state["iteration"], **self.loop.state_dict()},
            "images_per_iteration": self.cfg.SOLVER.IMS_PER_BATCH,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """What `state_dict` gave."""
        if "_trainer" not in state_dict:
            raise InputError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: its last checkpoint holds no optimizer state "
                "(a trainer of detectron2 0.6 wrote it), so that the run cannot go on as if it had "
                "not stopped. Start a new one from it: another OUTPUT_DIR, and that file as "
                "MODEL.WEIGHTS."
            )
        images = self.cfg.SOLVER.IMS_PER_BATCH
        before = state_dict.get("images_per_iteration", images)
        if before != images:
            raise InputError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: an iteration of its last checkpoint is an "
                f"update from {before} images; here it would be one from {images}, so that neither "
                "iterations nor schedule are the same. Resume with that SOLVER.IMS_PER_BATCH (with "
                "SOLVER.REFERENCE_WORLD_SIZE on as many processes as before); VIRTEX.ACCUMULATE "
                "may change."
            )
        TrainerBase.load_state_dict(self, state_dict)
        self.loop.load_state_dict(state_dict["_trainer"])

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks and this project's."""
        cfg, loader, period = self.cfg, self.data_loader, self.cfg.VIRTEX.LOG_PERIOD
        evaluations = []
        if cfg.DATASETS.TEST:
            evaluations.append(self._evaluation(cfg.TEST.EVAL_PERIOD, self.test))
            if cfg.TEST.AUG.ENABLED:
                # Once, as detectron2's train_net.py: it takes as many times longer as it has sizes.
                evaluations.append(self._evaluation(0, self.test_with_tta))
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler() if cfg.SOLVER.BACKBONE_LR_FACTOR == 1 else LRScheduler(),
            SkippedImages(
                *(lambda: loader.skipped, len(loader.training_set)),
                *(cfg.VIRTEX.MAX_SKIPPED_SHARE, "VIRTEX.MAX_SKIPPED_SHARE"),
                1 if comm.get_world_size() == 1 else period,
            ),
            UpdateEMA(self.ema) if self.ema else None,
            StopHook(),  # what stands behind it is what a resumed run makes up for
            self._precise_bn() if cfg.TEST.PRECISE_BN.ENABLED else None,
            # After PreciseBN, whose statistics are to be saved; before the evaluation, so that what
            # was trained is safe when that fails.
            *self.checkpoint_hooks(cfg.SOLVER.CHECKPOINT_PERIOD),
            ExportEMA(self._ema_checkpointer()) if self.ema and comm.is_main_process() else None,
            *evaluations,
            *self.writer_hooks(cfg.SOLVER.IMS_PER_BATCH, period),  # of what the others found
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector on MODEL.DEVICE."""
        try:
            model = super().build_model(cfg)
        except (KeyError, AssertionError) as error:
            if "registry" in str(error):
                raise InputError(f"config: {error.args[0]} Check the NAME of that part.") from error
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if "/detectron2/" not in frame.filename:
                raise
            # An assertion may have no words, but its line names the key.
            raise InputError(
                f"config: detectron2 cannot build MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} from it: {type(error).__name__} {error} in "
                f"{os.path.basename(frame.filename)}, line {frame.lineno}: {frame.line}"
            ) from error
        if cfg.VIRTEX.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's, with SOLVER.BACKBONE_LR_FACTOR.

        What clips all gradients together is not in it but in the loop.
        """
        if clips_full_model(cfg):
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)
        factor = cfg.SOLVER.BACKBONE_LR_FACTOR
        if factor != 1:
            backbone = set(backbone_names(model.state_dict()).values())
            own = {id(p) for name, p in model.named_parameters() if name in backbone}
            count = split_groups(optimizer, own, factor)
            if not count:
                raise InputError(
                    f"SOLVER.BACKBONE_LR_FACTOR {factor:g}: nothing of the backbone is trained "
                    f"(MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}). Leave it at 1."
                )
            logger.info(
                "%d tensors of the backbone are trained at %g times the learning rate: %g.",
                *(count, factor, factor * cfg.SOLVER.BASE_LR),
            )
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg, seed=cfg.SEED)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        return TestLoader(cfg, dataset_name)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate with detectron2's test-time augmentation, as TEST.AUG says.

        Predictions are stored in OUTPUT_DIR/inference_TTA.

        Returns:
            As `test`, each name with `_TTA` behind it.
        """
        logger.info("Evaluating with test-time augmentation ...")
        evaluators = [
            build_evaluator(cfg, name, folder="inference_TTA") for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", result) for name, result in results.items())

    def _precise_bn(self) -> HookBase | None:
        if not get_bn_modules(self.model):
            logger.info("TEST.PRECISE_BN: the model has no batch norm that is trained.")
            return None
        models = {"the model": self.model}
        if self.ema:
            models["its average"] = self.ema.model
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # they would idle between its few uses
        # The batches that norms see in training, and that fit into memory; as many images.
        cfg.SOLVER.IMS_PER_BATCH //= cfg.VIRTEX.ACCUMULATE
        training_set = self.data_loader.training_set
        return PreciseBN(
            cfg.TEST.EVAL_PERIOD,
            models,
            lambda: build_train_loader(cfg, training_set),
            cfg.TEST.PRECISE_BN.NUM_ITER * cfg.VIRTEX.ACCUMULATE,
            cfg.SEED,
        )

    def _ema_checkpointer(self) -> DetectorCheckpointer:
        return DetectorCheckpointer(
            self.ema.model,
            self.cfg.OUTPUT_DIR,
            preprocessing=config_preprocessing(self.cfg),
            writer=self.checkpointer.writer,
        )

    def _evaluated_model(self) -> nn.Module:
        if self.ema is None:
            return self.model
        average = self.cfg.VIRTEX.EMA.EVALUATE
        logger.info(
            "What is evaluated %s the moving average of the weights over %d updates.",
            "is" if average else "are the weights themselves, not",
            self.ema.updates,
        )
        return self.ema.model if average else self.model

    def _evaluation(self, period: int, test: Callable[[CfgNode, nn.Module], dict]) -> Evaluation:
        def evaluate() -> dict:
            with own_randomness(self.cfg.SEED, self.iter, comm.get_rank()):
                results = settled(lambda: test(self.cfg, self._evaluated_model()))
            self._last_eval_results.update(results)
            return results

        return Evaluation(period, evaluate, self.cfg.OUTPUT_DIR)
