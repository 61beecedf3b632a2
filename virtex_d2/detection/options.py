"""What a config may ask of training and evaluation, checked before anything is built."""

import math
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from virtex_d2.engine.device import AMP_DTYPES, check_amp
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.loop import UpdateLoop

FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)


def check_training(cfg: CfgNode) -> None:
    """Check the keys about precision, clipping, averaging and evaluation."""
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
