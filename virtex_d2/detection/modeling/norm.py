"""Synchronised batch norm where it runs, and its equal where it does not."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.utils import comm

logger = logging.getLogger(__name__)


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
