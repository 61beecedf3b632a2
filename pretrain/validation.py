"""Validation: the mean loss over every caption, beside what a blind model would reach."""

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from pretrain.data.loader import build_eval_loader
from pretrain.methods.captioning.samples import PretrainData
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.stopping import abandonable

logger = logging.getLogger(__name__)

# Losses of which a perplexity can be told: those that predict a word.
_OF_WORDS = ("loss_captioning", "loss_masked_lm")


def check_metric(metric: str, objective: nn.Module) -> None:
    """Raise InputError if TEST.BEST_METRIC is none of the losses that validation records for the
    objective.
    """
    possible = [f"val/{name}" for name in ("loss", *objective.losses)]
    if metric not in possible:
        raise InputError(
            f"TEST.BEST_METRIC: {metric!r} is none of what is validated: {', '.join(possible)}."
            + nearest(metric, possible)
        )


@torch.no_grad()
def validate(
    objective: nn.Module,
    losses_of: Callable[[dict], dict[str, torch.Tensor]],
    data: PretrainData,
    cfg: CfgNode,
) -> dict[str, float]:
    """Mean losses (nats a prediction) and perplexities on the validation data, over all processes.

    The model is that of the first process: normalisation statistics, which each process gathers
    for itself in training, are copied from there.

    Args:
        objective: of `pretrain.methods.captioning.model`; its mode is restored.
        losses_of: batch of the loader -> losses.
        data: with validation data.
        cfg: of the run; read are TEST.IMS_PER_BATCH and DATA.

    Returns:
        "loss" (the sum), "loss_..." each, "perplexity_..." of those that predict words, the
        objective's baseline by its name ("unigram_entropy", "label_entropy": what a model would
        reach that knows frequencies and nothing else) and "images_skipped".

    Raises:
        StopRequested: all processes are to stop; the objective is left in evaluation mode.
    """
    training = objective.training
    objective.eval()
    _share_buffers(objective)
    sums: dict[str, float] = {}
    predicted = skipped = 0
    loader = build_eval_loader(
        data.val,
        cfg.TEST.IMS_PER_BATCH,
        cfg.DATA.NUM_WORKERS,
        one_caption=data.val_labels is not None,
        pin=cfg.MODEL.DEVICE.startswith("cuda"),
    )
    logger.info("Validating on %d captions or images ...", len(loader.dataset))
    for batch in abandonable(loader):
        skipped += int(batch["num_skipped"])
        count = objective.num_predictions(batch) if len(batch["position"]) else 0
        if not count:
            continue
        for name, loss in losses_of(batch).items():
            sums[name] = sums.get(name, 0.0) + loss.item() * count
        predicted += count
    objective.train(training)

    gathered = comm.all_gather((sums, predicted, skipped))
    predicted = sum(part[1] for part in gathered)
    if not predicted:
        raise InputError(
            f"{cfg.DATA.VAL_CAPTIONS}: none of its images in {cfg.DATA.VAL_IMAGES} can be decoded "
            f"and has something to predict ({sum(part[2] for part in gathered)} of "
            f"{len(data.val.records)} cannot be decoded). Replace them."
        )
    losses = {
        name: sum(part[0].get(name, 0.0) for part in gathered) / predicted
        for name in objective.losses
    }
    results = {"loss": sum(losses.values()), **losses}
    for name, loss in losses.items():
        if name.startswith(_OF_WORDS):
            results[name.replace("loss", "perplexity", 1)] = math.exp(min(loss, 50.0))
    results[objective.baseline] = getattr(data, objective.baseline)
    results["images_skipped"] = sum(part[2] for part in gathered)
    return results


def _share_buffers(module: nn.Module) -> None:
    if comm.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
