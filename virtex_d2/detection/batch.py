"""What an update is: its images on processes and passes, its precision, its clipping."""

import logging
import math
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch import nn

from virtex_d2.engine.device import AMP_DTYPES, check_amp
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.loop import UpdateLoop

logger = logging.getLogger(__name__)

FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)

# These are rounded; a period of 0 would mean "never", or divide by zero.
_AT_LEAST_ONE = (
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_KEEP_EVERY",
    "TEST.EVAL_PERIOD",
)


def resolve_batch(cfg: CfgNode) -> CfgNode:
    """The config for the processes that there are, and one line in the log about its numbers.

    SOLVER.REFERENCE_WORLD_SIZE is detectron2's linear scaling (Goyal et al., arXiv 1706.02677):
    with another number of processes than this each keeps its share of images, and learning rate,
    schedule and periods follow; the decay of VIRTEX.EMA too (Busbridge et al., arXiv 2307.13813).
    VIRTEX.ACCUMULATE changes none of it: the images of an update come in as many passes.

    Args:
        cfg: frozen or not; it is not changed.

    Returns:
        `cfg`, or where it is scaled a copy.
    """
    processes, reference = comm.get_world_size(), cfg.SOLVER.REFERENCE_WORLD_SIZE
    images, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.VIRTEX.ACCUMULATE
    if images < 1:
        raise InputError(f"SOLVER.IMS_PER_BATCH is {images}; expected a number of images.")
    if passes < 1:
        raise InputError(
            f"VIRTEX.ACCUMULATE is {passes}; expected the number of passes of an update, 1 for all "
            "images at once."
        )
    if reference < 0 or (reference and images % reference):
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}; expected the number of processes among "
            f"which SOLVER.IMS_PER_BATCH {images} is shared equally, or 0 for no scaling."
        )
    scaled = _scale(cfg, processes)
    images = scaled.SOLVER.IMS_PER_BATCH
    if images % processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes cannot share equally. "
            "Start another number of processes, set it to a multiple of them, or set "
            "SOLVER.REFERENCE_WORLD_SIZE to the number that the config is meant for, to scale "
            "batch and schedule with it."
        )
    share = images // processes
    if share % passes:
        possible = [str(n) for n in range(1, share + 1) if share % n == 0]
        raise InputError(
            f"VIRTEX.ACCUMULATE is {passes}, but the {share} images that each of {processes} "
            f"process{_es(processes)} has for an update (SOLVER.IMS_PER_BATCH {images}) do not "
            f"come in as many equal passes; possible are {', '.join(possible)}."
        )
    _log(scaled, processes, share // passes, cfg)
    return scaled


def _scale(cfg: CfgNode, processes: int) -> CfgNode:
    """detectron2's scaling, with what it leaves open; `cfg` itself where there is none."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    every = cfg.SOLVER.CHECKPOINT_KEEP_EVERY * cfg.SOLVER.REFERENCE_WORLD_SIZE / processes
    scaled.SOLVER.CHECKPOINT_KEEP_EVERY = round(every)
    for key in _AT_LEAST_ONE:
        group, name = key.split(".")
        if cfg[group][name] > 0:
            scaled[group][name] = max(1, scaled[group][name])
    # The average is to span as many images as before.
    scaled.VIRTEX.EMA.DECAY **= processes / cfg.SOLVER.REFERENCE_WORLD_SIZE
    if frozen:
        scaled.freeze()
    return scaled


def _log(cfg: CfgNode, processes: int, images: int, given: CfgNode) -> None:
    solver = cfg.SOLVER
    passes = cfg.VIRTEX.ACCUMULATE
    origin = ""
    if cfg is not given:
        reference = given.SOLVER.REFERENCE_WORLD_SIZE
        origin = (
            f"; scaled from {reference} process{_es(reference)} with "
            f"{given.SOLVER.IMS_PER_BATCH} images, learning rate {given.SOLVER.BASE_LR:g} and "
            f"{given.SOLVER.MAX_ITER} iterations"
        )
    logger.info(
        "An iteration is one update from %d images: %d process%s x %d pass%s x %d; learning rate "
        "%g, warm-up %d, steps %s, %d iterations%s.",
        solver.IMS_PER_BATCH,
        processes,
        _es(processes),
        passes,
        _es(passes),
        images,
        solver.BASE_LR,
        solver.WARMUP_ITERS,
        tuple(solver.STEPS),
        solver.MAX_ITER,
        origin,
    )


def _es(number: int) -> str:
    return "" if number == 1 else "es"


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
