"""How many images, at which rate, for how long: one rule for all kinds of runs.

SOLVER.REFERENCE_WORLD_SIZE is detectron2's linear scaling (Goyal et al., arXiv 1706.02677): with
another number of processes than this each keeps its share of images, and learning rates, schedule
and periods follow. Accumulation changes none of it: the images of an update come in passes.
"""

from collections.abc import Collection

from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from yacs.config import CfgNode

from virtex_d2.engine.config import get_key, set_key
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.loop import share_of

# Rounded, but not to 0, which would mean "never", or divide by zero.
_PERIODS = (
    *("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_KEEP_EVERY"),
    "TEST.EVAL_PERIOD",
)


def scale_to_processes(
    cfg: CfgNode,
    passes: int,
    passes_key: str,
    rates: Collection[str] = (),
    periods: Collection[str] = (),
) -> CfgNode:
    """The config for the processes that there are; refused where they cannot share a batch.

    Args:
        cfg: with detectron2's keys of SOLVER (STEPS may be missing) and TEST.EVAL_PERIOD.
        passes: in which the images of an update come.
        passes_key: which says so.
        rates: keys that are scaled as SOLVER.BASE_LR.
        periods: keys that are scaled as TEST.EVAL_PERIOD.

    Returns:
        `cfg`, or where it is scaled a copy.
    """
    processes, reference = comm.get_world_size(), cfg.SOLVER.REFERENCE_WORLD_SIZE
    images = cfg.SOLVER.IMS_PER_BATCH
    if images < 1:
        raise InputError(f"SOLVER.IMS_PER_BATCH is {images}; expected a number of images.")
    if passes < 1:
        raise InputError(
            f"{passes_key} is {passes}; expected the number of passes of an update, 1 for all "
            "images at once."
        )
    if reference < 0 or (reference and images % reference):
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}; expected the number of processes among "
            f"which SOLVER.IMS_PER_BATCH {images} is shared equally, or 0 for no scaling."
        )
    scaled = _scale(cfg, processes, rates, periods)
    images = scaled.SOLVER.IMS_PER_BATCH
    share = share_of(
        images,
        ", or set SOLVER.REFERENCE_WORLD_SIZE to the number that the config is meant for, to scale "
        "batch and schedule with it",
    )
    if share % passes:
        possible = [str(n) for n in range(1, share + 1) if share % n == 0]
        raise InputError(
            f"{passes_key} is {passes}, but the {share} images that each of {processes} "
            f"process{_es(processes)} has for an update (SOLVER.IMS_PER_BATCH {images}) do not "
            f"come in as many equal passes; possible are {', '.join(possible)}."
        )
    return scaled


def _scale(
    cfg: CfgNode, processes: int, rates: Collection[str], periods: Collection[str]
) -> CfgNode:
    """detectron2's scaling, with what it leaves open; `cfg` itself where there is none."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return cfg
    given = cfg.clone()
    given.defrost()
    steps = given.SOLVER.setdefault("STEPS", None)
    given.SOLVER.STEPS = steps or ()
    scaled = DefaultTrainer.auto_scale_workers(given, processes)
    if steps is None:
        del scaled.SOLVER["STEPS"]
    factor = processes / reference
    for key in rates:
        set_key(scaled, key, get_key(cfg, key) * factor)
    for key in (*_PERIODS, *periods):
        if get_key(cfg, key) > 0:
            set_key(scaled, key, max(1, round(get_key(cfg, key) / factor)))
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def described(cfg: CfgNode, passes: int) -> str:
    """What an iteration is made of, in words: "16 images: 2 processes x 4 passes x 2"."""
    processes, images = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    return (
        f"{images} images: {processes} process{_es(processes)} x {passes} pass{_es(passes)} x "
        f"{images // processes // passes}"
    )


def origin(cfg: CfgNode, given: CfgNode, rates: Collection[str] = ()) -> str:
    """What a scaled config was scaled from, in words; "" where it is the one that was given."""
    if cfg is given:
        return ""
    solver = given.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    told = " and ".join(f"{get_key(given, key):g}" for key in ("SOLVER.BASE_LR", *rates))
    return (
        f"; scaled from {reference} process{_es(reference)} with {solver.IMS_PER_BATCH} images, "
        f"learning rate {told} and {solver.MAX_ITER} iterations"
    )


def _es(number: int) -> str:
    return "" if number == 1 else "es"
