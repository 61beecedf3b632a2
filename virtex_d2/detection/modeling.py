"""What detectron2's models get: heads for its registry, and norms that run on the device."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5 heads of a C4 detector with one more norm behind res5 (`roi_heads.res5.norm`).

    MoCo (arXiv 1911.05722, appendix) introduced it: features of a backbone that is trained with
    batch norm arrive at the new box head on a scale it can work with. VirTex uses it for VOC.
    """

    @classmethod
    def _build_res5_block(cls, cfg) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


def resolve_norms(cfg: CfgNode) -> None:
    """Replace every norm "SyncBN" of MODEL by its equal on a CPU, in place, and log it.

    torch's SyncBatchNorm runs on GPUs only. On a CPU one process has nothing to synchronise: "BN";
    several need detectron2's "naiveSyncBN", which averages the processes' statistics and is the
    same where they have equally many images of one size. Tensor names and shapes are the same, so
    that checkpoints pass between them.

    Args:
        cfg: with MODEL.DEVICE resolved, not frozen.
    """
    if cfg.MODEL.DEVICE != "cpu":
        return
    processes = comm.get_world_size()
    replacement = "BN" if processes == 1 else "naiveSyncBN"
    replaced = []
    for name, node in _groups(cfg.MODEL, "MODEL"):
        if node.get("NORM") == "SyncBN":
            node.NORM = replacement
            replaced.append(f"{name}.NORM")
    if replaced:
        logger.info(
            "SyncBN does not run on a CPU; with %d process%s %s does the same: %s",
            processes,
            "" if processes == 1 else "es",
            replacement,
            ", ".join(replaced),
        )


def _groups(node: CfgNode, name: str) -> Iterator[tuple[str, CfgNode]]:
    yield name, node
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _groups(value, f"{name}.{key}")
