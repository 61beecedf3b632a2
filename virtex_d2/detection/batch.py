"""What an update is: its images on processes and passes, its precision, its clipping."""

import logging
import math
from collections.abc import Callable, Collection, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from virtex_d2.engine.device import AMP_DTYPES, check_amp
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.loop import UpdateLoop
from virtex_d2.engine.scaling import described, origin, scale_to_processes

logger = logging.getLogger(__name__)

FULL_MODEL = "full_model"
_BACKBONE = "backbone"  # name of its optimizer groups
CLIP_TYPES = ("value", "norm", FULL_MODEL)


def resolve_batch(cfg: CfgNode) -> CfgNode:
    """The config for the processes that there are, and one line in the log about its numbers.

    As `engine.scaling` says; the decay of VIRTEX.EMA is scaled too (Busbridge et al., arXiv
    2307.13813).

    Returns:
        `cfg`, or where it is scaled a copy.
    """
    scaled = scale_to_processes(cfg, cfg.VIRTEX.ACCUMULATE, "VIRTEX.ACCUMULATE")
    if scaled is not cfg:
        frozen = scaled.is_frozen()
        scaled.defrost()
        # The average is to span as many images as before.
        scaled.VIRTEX.EMA.DECAY **= comm.get_world_size() / cfg.SOLVER.REFERENCE_WORLD_SIZE
        if frozen:
            scaled.freeze()
    solver = scaled.SOLVER
    logger.info(
        "An iteration is one update from %s; learning rate %g, warm-up %d, steps %s, %d "
        "iterations%s.",
        described(scaled, cfg.VIRTEX.ACCUMULATE),
        *(solver.BASE_LR, solver.WARMUP_ITERS, tuple(solver.STEPS), solver.MAX_ITER),
        origin(scaled, cfg),
    )
    return scaled


def check_training(cfg: CfgNode) -> None:
    """Check the keys about rates, precision, clipping, averaging and evaluation."""
    factor = cfg.SOLVER.BACKBONE_LR_FACTOR
    if not (math.isfinite(factor) and factor > 0):
        raise InputError(
            f"SOLVER.BACKBONE_LR_FACTOR is {factor}; expected a number above 0, such as 0.1 "
            "(MODEL.BACKBONE.FREEZE_AT 5 trains nothing of it)."
        )
    if cfg.SOLVER.AMP.ENABLED:
        check_amp(cfg)
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        _check_clipping(cfg.SOLVER.CLIP_GRADIENTS)
    if cfg.VIRTEX.EMA.ENABLED and not 0 < cfg.VIRTEX.EMA.DECAY < 1:
        raise InputError(
            f"VIRTEX.EMA.DECAY is {cfg.VIRTEX.EMA.DECAY}; expected a number between 0 and 1, such "
            "as 0.9998."
        )
    check_augmented_evaluation(cfg)


def check_augmented_evaluation(cfg: CfgNode) -> None:
    """Check that detectron2's test-time augmentation can do what TEST.AUG asks."""
    if not cfg.TEST.AUG.ENABLED:
        return
    found = [
        f"{key} {value}"
        for key, value, wanted in (
            ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, "GeneralizedRCNN"),
            ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON, False),
            ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS, False),
        )
        if value != wanted
    ]
    if found:
        raise InputError(
            "TEST.AUG.ENABLED: detectron2 augments at test time for GeneralizedRCNN with boxes and "
            f"masks from its own proposals alone; found {', '.join(found)}. Set it to False."
        )
    if not cfg.TEST.AUG.MIN_SIZES:
        raise InputError("TEST.AUG.MIN_SIZES is empty; expected shortest edges in pixels.")


def build_loop(
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable],
) -> UpdateLoop:
    """The loop that SOLVER.AMP, SOLVER.CLIP_GRADIENTS and VIRTEX.ACCUMULATE describe."""
    dtype = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return UpdateLoop(
        model,
        optimizer,
        batches,
        seed=cfg.SEED,
        passes=cfg.VIRTEX.ACCUMULATE,
        dtype=dtype,
        # bfloat16 has float32's range: nothing underflows that float32 would keep.
        scaler=torch.amp.GradScaler("cuda") if dtype == torch.float16 else None,
        max_norm=clip.CLIP_VALUE if clips_full_model(cfg) else None,
        norm_type=clip.NORM_TYPE,
        folder=cfg.OUTPUT_DIR,
        advice="lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or compute in float32 "
        "(SOLVER.AMP.ENABLED False)",
    )


def split_groups(optimizer: torch.optim.Optimizer, chosen: Collection[int], factor: float) -> int:
    """Give the backbone's parameters groups of their own, at `factor` times the rate.

    Args:
        optimizer: that has made no update yet, and has no schedule.
        chosen: ids of its parameters.

    Returns:
        How many of them the optimizer trains.
    """
    groups, count = [], 0
    for group in optimizer.param_groups:
        mine = [p for p in group["params"] if id(p) in chosen]
        rest = [p for p in group["params"] if id(p) not in chosen]
        count += len(mine)
        if rest:
            groups.append({**group, "params": rest})
        if mine:
            groups.append({**group, "params": mine, "lr": group["lr"] * factor, "name": _BACKBONE})
    optimizer.param_groups[:] = groups
    return count


class LRScheduler(hooks.LRScheduler):
    """detectron2's, of the groups of `split_groups`: `lr` is not the backbone's, `lr_backbone` is.

    It has the same name, by which checkpoints keep the schedule.
    """

    def after_step(self) -> None:
        rates = {
            "lr_backbone" if group.get("name") == _BACKBONE else "lr": group["lr"]
            for group in self.trainer.optimizer.param_groups
        }
        self.trainer.storage.put_scalars(smoothing_hint=False, **rates)
        self.scheduler.step()


def clips_full_model(cfg: CfgNode) -> bool:
    """Whether the norm of all gradients together is clipped."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL


def _check_clipping(clip: CfgNode) -> None:
    if clip.CLIP_TYPE not in CLIP_TYPES:
        raise InputError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}'; expected one of "
            f"{', '.join(CLIP_TYPES)}.{nearest(clip.CLIP_TYPE, CLIP_TYPES)}"
        )
    if not (clip.CLIP_VALUE > 0 and math.isfinite(clip.CLIP_VALUE)):
        raise InputError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE is {clip.CLIP_VALUE}; expected a positive number."
        )
