"""How many images an optimizer update takes, and on how many processes and passes they come."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

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
