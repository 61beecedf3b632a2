"""Fine-tuning: detectron2's `DefaultTrainer` with strict weights, safe checkpoints, any device."""

import logging
import time
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from virtex_d2.checkpoint.detector import DetectorCheckpointer
from virtex_d2.checkpoint.transfer import config_preprocessing, is_backbone, load_backbone
from virtex_d2.data.loader import TestLoader, TrainLoader, build_train_loader
from virtex_d2.evaluation import build_evaluator
from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.launch import wrap_ddp
from virtex_d2.runtime.setup import write_config

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations, as in detectron2


class DetectionTrainer(DefaultTrainer):
    """Trains a detector as the config says.

        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()

    MODEL.WEIGHTS is "" (random), a checkpoint with a ResNet (loaded strictly: every backbone tensor
    or an error, and it must compute what it computed) or a detector's checkpoint. With SOLVER.AMP
    on a CPU the losses are computed under bfloat16 autocast.

    Args:
        cfg: with MODEL.DEVICE and norms resolved; its data sets registered.

    Raises:
        InputError: the config or the data cannot be used.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer's own: that opens metrics.json before the weights are known to load,
        # reads the annotations twice for PreciseBN, and its mixed precision is for GPUs only.
        super(DefaultTrainer, self).__init__()
        if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
            raise InputError(
                f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which "
                f"{comm.get_world_size()} processes cannot share equally."
            )
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = _loop(cfg)(wrap_ddp(model), self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectorCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            save_to_disk=comm.is_main_process(),
            preprocessing=config_preprocessing(cfg),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def evaluate_only(cls, cfg: CfgNode, resume: bool = False) -> dict:
        """Evaluate MODEL.WEIGHTS, or with `resume` the last checkpoint, on DATASETS.TEST.

        Raises:
            InputError: there are no weights of the whole detector.
        """
        model = cls.build_model(cfg)
        checkpointer = DetectorCheckpointer(model, cfg.OUTPUT_DIR, whole=True)
        weights = cfg.MODEL.WEIGHTS
        if not (resume and checkpointer.has_checkpoint()) and (not weights or is_backbone(weights)):
            raise InputError(
                f"MODEL.WEIGHTS {weights!r}: --eval-only needs a detector's checkpoint, such as "
                "OUTPUT_DIR/model_final.pth, or --resume and one in OUTPUT_DIR; a backbone alone "
                "detects nothing."
            )
        checkpointer.resume_or_load(weights, resume=resume)
        results = cls.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's last checkpoint if `resume`, else start from MODEL.WEIGHTS.

        Raises:
            InputError: the file is missing, damaged or does not fit; nothing was loaded.
        """
        resuming = resume and self.checkpointer.has_checkpoint()
        if not resuming and is_backbone(self.cfg.MODEL.WEIGHTS):
            report = load_backbone(self.model, self.cfg.MODEL.WEIGHTS, self.cfg)
            if comm.is_main_process():
                report.write(self.cfg.OUTPUT_DIR)
        else:
            super().resume_or_load(resume)
        if resuming:
            write_config(self.cfg)

    def train(self) -> dict | None:
        """Train to SOLVER.MAX_ITER.

        Returns:
            The last evaluation's results where TEST.EXPECTED_RESULTS asks for a check of them.
        """
        if comm.is_main_process():  # last, so that they write what the other hooks found
            self.register_hooks([hooks.PeriodicWriter(self.build_writers(), LOG_PERIOD)])
        return super().train()

    def state_dict(self) -> dict:
        """Iteration, schedule (of its hook) and optimizer, which detectron2 0.6 leaves out."""
        return {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """What `state_dict` gave.

        Raises:
            InputError: the optimizer's state is missing: the checkpoint is of stock detectron2.
        """
        if "_trainer" not in state_dict:
            raise InputError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: its last checkpoint holds no optimizer state "
                "(a trainer of detectron2 0.6 wrote it), so that the run cannot go on as if it had "
                "not stopped. Start a new one from it: another OUTPUT_DIR, and that file as "
                "MODEL.WEIGHTS."
            )
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks but for the writers, which `train` adds, and `SkippedImages`."""
        cfg = self.cfg
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            SkippedImages(cfg.VIRTEX.MAX_SKIPPED_SHARE),
            self._precise_bn() if cfg.TEST.PRECISE_BN.ENABLED else None,
            # After PreciseBN, whose statistics are to be saved; before the evaluation, so that what
            # was trained is safe when that fails.
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            if comm.is_main_process()
            else None,
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test) if cfg.DATASETS.TEST else None,
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector on MODEL.DEVICE.

        Raises:
            InputError: a NAME in the config is of nothing that is registered.
        """
        try:
            model = super().build_model(cfg)
        except KeyError as error:
            if "registry" not in str(error):
                raise
            raise InputError(f"config: {error.args[0]} Check the NAME of that part.") from error
        if cfg.VIRTEX.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        return TestLoader(cfg, dataset_name)

    def _precise_bn(self) -> HookBase | None:
        if not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # they would idle between its few uses
        loader = build_train_loader(cfg, self.data_loader.records)
        period, batches = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(period, self.model, loader, batches)

    def _test(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results


class CPUAutocastTrainer(SimpleTrainer):
    """detectron2's loop with the forward pass under bfloat16 autocast on the CPU.

    detectron2's `AMPTrainer` is for CUDA. bfloat16 has float32's range, so that nothing is scaled.
    """

    def run_step(self) -> None:
        """One iteration: batch, losses, gradients, update."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.model(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class SkippedImages(HookBase):
    """Counts the files that training had to do without, and stops the run at too many of them.

    Writes `images_skipped` to the metrics.

    Args:
        max_share: the fraction of the data set's images that may be skipped, 0 to 1.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share

    def after_step(self) -> None:
        # Processes tell each other what they met; not at every iteration, it makes them wait.
        period = 1 if comm.get_world_size() == 1 else LOG_PERIOD
        iteration = self.trainer.iter + 1
        if iteration % period and iteration != self.trainer.max_iter:
            return
        loader = self.trainer.data_loader
        skipped = sorted(set().union(*comm.all_gather(loader.skipped)))
        self.trainer.storage.put_scalar("images_skipped", len(skipped), smoothing_hint=False)
        total = len(loader.records)
        if len(skipped) > self._max_share * total:
            raise InputError(
                f"{len(skipped)} of {total} training images are unusable, more than the share "
                f"VIRTEX.MAX_SKIPPED_SHARE {self._max_share} allows; the first: "
                f"{', '.join(skipped[:10])}. Replace or remove them, or allow a larger share."
            )


def _loop(cfg: CfgNode) -> type[SimpleTrainer]:
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer
    return CPUAutocastTrainer if cfg.MODEL.DEVICE == "cpu" else AMPTrainer
