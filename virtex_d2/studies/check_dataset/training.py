"""Whether a training would start: the checks that tools/train_net.py makes itself."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.engine.errors import InputError


def refusal(cfg: CfgNode) -> str:
    """Why training or evaluating on a config's data sets would not start; "" where it would."""
    try:
        register_datasets(cfg.clone(), eval_only=not cfg.DATASETS.TRAIN)
    except InputError as error:
        return str(error)
    return ""


def box_detector(
    train: Sequence[tuple[Sequence[str], AnnotationTable]],
    test: Sequence[tuple[Sequence[str], AnnotationTable]],
) -> CfgNode:
    """The config of a detector of boxes on data sets that have no config.

    Args:
        train, test: [type, annotation file or folder, image folder or split] of each, and what was
            read there. A VOC folder's classes are those of its files.
    """
    cfg = get_virtex_cfg()
    entries, names = [], ([], [])
    for role, sets in enumerate((train, test)):
        for words, table in sets:
            name = f"check_dataset_{len(entries)}"
            classes = [list(table.categories.values())] if table.kind == "voc" else []
            entries.append([name, *words, *classes])
            names[role].append(name)
    cfg.VIRTEX.DATASETS = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = map(tuple, names)
    cfg.MODEL.MASK_ON = False
    return cfg
