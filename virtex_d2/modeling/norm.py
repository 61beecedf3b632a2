"""Synchronised batch norm where it works, and its equal where it does not."""

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm

logger = logging.getLogger(__name__)

NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def resolve_norms(cfg: CfgNode) -> None:
    """Replace "SyncBN" by what computes the same here, in `cfg`, and log it.

    torch's SyncBatchNorm runs on GPUs only. On a CPU one process needs no synchronisation: "BN";
    several need detectron2's "naiveSyncBN", whose parameters have the same names and shapes.
    """
    if cfg.MODEL.DEVICE != "cpu":
        return
    replacement = "BN" if comm.get_world_size() == 1 else "naiveSyncBN"
    for key in NORM_KEYS:
        if cfg.MODEL[key].NORM == "SyncBN":
            cfg.MODEL[key].NORM = replacement
            logger.info(
                "MODEL.%s.NORM: SyncBN does not run on a CPU; %s computes the same in %d "
                "process(es).",
                key,
                replacement,
                comm.get_world_size(),
            )
