"""The two starts without a checkpoint, by one name each for detectors, comparisons and probes.

Both are detectron2's random weights. They differ in where the last norm's scale of each residual
block begins, which decides how early a detector learns (docs/transfer.md): at 1, detectron2's own
start, or at 0, as a pretraining's network does (Goyal et al., arXiv 1706.02677).
"""

import logging

from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from torch import nn

from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

RANDOM = "random"
ZERO_SCALES = "random_zero_scales"
STARTS = (RANDOM, ZERO_SCALES)


def is_random(weights: str) -> bool:
    """Whether MODEL.WEIGHTS names a start without a checkpoint; "" is `RANDOM`."""
    return weights in ("", *STARTS)


def start_at_random(model: nn.Module, weights: str) -> None:
    """Make the start that MODEL.WEIGHTS names of a model that detectron2 has just built.

    Args:
        model: with detectron2's ResNet in it, of a C4 detector its ROI heads included.
        weights: what `is_random` says yes to.
    """
    if weights == ZERO_SCALES:
        norms = [last_norm(block) for block in model.modules() if _is_residual(block)]
        if any(isinstance(norm, FrozenBatchNorm2d) for norm in norms):
            raise InputError(
                f"MODEL.WEIGHTS {ZERO_SCALES}: some residual blocks have frozen norms, whose "
                "scales would stay 0. Train them: MODEL.RESNETS.NORM BN or SyncBN, "
                f"MODEL.BACKBONE.FREEZE_AT 0; or start at {RANDOM}."
            )
        if not norms or not all(hasattr(norm, "weight") for norm in norms):
            raise InputError(
                f"MODEL.WEIGHTS {ZERO_SCALES}: the model has no residual blocks with norms; start "
                f"at {RANDOM}."
            )
        for norm in norms:
            nn.init.zeros_(norm.weight)
    scale = 0 if weights == ZERO_SCALES else 1
    logger.info(
        "MODEL.WEIGHTS %s: random weights, scales of the residual blocks' last norms at %d.",
        weights or RANDOM,
        scale,
    )


def last_norm(block: nn.Module) -> nn.Module | None:
    """The norm of the last convolution of one of detectron2's residual blocks."""
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).norm


def _is_residual(module: nn.Module) -> bool:
    return isinstance(module, CNNBlockBase) and hasattr(module, "conv2")
