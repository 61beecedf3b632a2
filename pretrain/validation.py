"""Validation: means over every sample of all processes, beside what a blind model would reach."""

import logging
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.data.sources import Data
from pretrain.methods.method import Method
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.stopping import abandonable

logger = logging.getLogger(__name__)


def check_metric(metric: str, method: Method, others: Collection[str] = ()) -> None:
    """Raise InputError if TEST.BEST_METRIC is none of what is recorded.

    Args:
        metric: its value.
        method: whose losses and metrics are validated.
        others: what is recorded besides.
    """
    possible = [f"val/{name}" for name in ("loss", *method.losses, *method.metrics)]
    possible += others
    if metric not in possible:
        raise InputError(
            f"TEST.BEST_METRIC: {metric!r} is none of what is validated: {', '.join(possible)}."
            + nearest(metric, possible)
        )


@torch.no_grad()
def validate(
    method: Method,
    measure: Callable[[dict], dict[str, tuple[torch.Tensor, int]]],
    data: Data,
    cfg: CfgNode,
) -> dict[str, float]:
    """Means of losses and metrics over the validation samples of all processes.

    The model is that of the first process: normalisation statistics, which each process gathers
    for itself in training, are copied from there.

    Args:
        method: its mode is restored.
        measure: batch of the loader -> `Method.measure` of it.
        data, cfg: of the run.

    Returns:
        "loss" (the sum), "loss_..." and metrics each, what `Method.summarize` adds, and
        "images_skipped".

    Raises:
        StopRequested: all processes are to stop; the method is left in evaluation mode.
    """
    training = method.training
    method.eval()
    if comm.get_world_size() > 1:
        for buffer in method.buffers():
            dist.broadcast(buffer, src=0)
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    skipped = 0
    loader = data.val_loader(cfg)
    logger.info("Validating on %d samples ...", len(loader.dataset))
    for batch in abandonable(loader):
        skipped += int(batch["num_skipped"])
        for name, (mean, weight) in measure(batch).items() if len(batch["position"]) else ():
            if weight:
                sums[name] = sums.get(name, 0.0) + float(mean) * weight
                weights[name] = weights.get(name, 0) + weight
    method.train(training)

    gathered = comm.all_gather((sums, weights, skipped))
    skipped = sum(part[2] for part in gathered)
    names = dict.fromkeys([*method.losses, *(name for part in gathered for name in part[0])])
    totals = {name: sum(part[1].get(name, 0) for part in gathered) for name in names}
    if not any(totals.values()):
        raise InputError(
            f"{cfg.DATA.VAL_CAPTIONS or 'DATA.VAL_IMAGES'}: none of its images in "
            f"{cfg.DATA.VAL_IMAGES or data.val.records[0].file_name} can be decoded and has "
            f"something to predict ({skipped} of {len(data.val.records)} cannot be decoded). "
            "Replace them."
        )
    means = {
        name: sum(part[0].get(name, 0.0) for part in gathered) / total
        for name, total in totals.items()
        if total
    }
    results = {"loss": sum(means[name] for name in method.losses if name in means), **means}
    return {**results, **method.summarize(means, data.val), "images_skipped": skipped}
