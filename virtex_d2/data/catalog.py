"""Data sets named in the config: registered, and checked before a run depends on them."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from virtex_d2.runtime.errors import InputError, nearest

from .coco_file import check_coco_file

logger = logging.getLogger(__name__)

# detectron2's own default for its data sets' folder.
_DEFAULTS = {"DETECTRON2_DATASETS": "datasets"}


@dataclass(frozen=True)
class DataSet:
    """A data set of this run.

    Attributes:
        name: under which it is registered.
        source: its annotation file or folder.
        categories: names by category id; by class number where the type has no such ids.
        size: what it holds, for people.
    """

    name: str
    source: str
    categories: dict[int, str]
    size: str


def register_datasets(cfg: CfgNode, eval_only: bool = False) -> list[DataSet]:
    """Register VIRTEX.DATASETS, check what the run will use, and count its classes.

    That is DATASETS.TRAIN and DATASETS.TEST, the latter alone with `eval_only`. detectron2's own
    names (coco_2017_train, ...) need no entry. A MODEL.ROI_HEADS.NUM_CLASSES of -1 becomes the
    number of their categories, in `cfg`.

    Raises:
        InputError: an entry is malformed, a file is missing or inconsistent, an image is absent,
            the categories of two data sets differ, or their number is not NUM_CLASSES.
    """
    for entry in cfg.VIRTEX.DATASETS:
        name, kind, annotations, image_root = _entry(entry)
        TYPES[kind](name, annotations, image_root)
    required = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[required]:
        raise InputError(
            f"DATASETS.{required} is empty; name the data sets to use, for example "
            f"DATASETS.{required} \"('name',)\"."
        )
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    checked = [_checked(name, cfg) for name in dict.fromkeys(names)]
    _check_classes(cfg, checked)
    return checked


def log_datasets(datasets: list[DataSet]) -> None:
    """Say in the log what was found."""
    for dataset in datasets:
        logger.info("Data set %s: %s, %s", dataset.name, dataset.source, dataset.size)


def _register_coco(name: str, annotations: str, image_root: str) -> None:
    source = {"json_file": annotations, "image_root": image_root, "evaluator_type": "coco"}
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if {key: known.get(key) for key in source} != source:
            raise InputError(
                f"VIRTEX.DATASETS: the name '{name}' is taken by another data set; choose another."
            )
        return
    DatasetCatalog.register(name, lambda: load_coco_json(annotations, image_root, name))
    MetadataCatalog.get(name).set(**source)


# Type -> what registers (name, annotation file, image folder).
TYPES: dict[str, Callable[[str, str, str], None]] = {"coco": _register_coco}


def _entry(entry: Any) -> tuple[str, str, str, str]:
    is_list = isinstance(entry, Sequence) and not isinstance(entry, str)
    if not is_list or len(entry) != 4 or not all(isinstance(part, str) for part in entry):
        raise InputError(
            "VIRTEX.DATASETS: expected entries [name, type, annotation file, image folder], found "
            f"{entry!r}."
        )
    name, kind, annotations, image_root = entry
    if kind not in TYPES:
        raise InputError(
            f"VIRTEX.DATASETS: '{name}' has the type '{kind}'; expected one of {', '.join(TYPES)}."
            f"{nearest(kind, TYPES)}"
        )
    return name, kind, _expanded(annotations), _expanded(image_root)


def _expanded(path: str) -> str:
    for variable, value in _DEFAULTS.items():
        if variable not in os.environ:
            path = path.replace(f"${variable}", value).replace(f"${{{variable}}}", value)
    path = os.path.expanduser(os.path.expandvars(path))
    if "$" in path:
        raise InputError(f"VIRTEX.DATASETS: {path}: the environment has no such variable.")
    return path


def _checked(name: str, cfg: CfgNode) -> DataSet:
    if name not in DatasetCatalog:
        known = [known for known in DatasetCatalog.list() if not known.startswith("__")]
        raise InputError(
            f"DATASETS: '{name}' is not a known data set.{nearest(name, known)} Name its files "
            "with VIRTEX.DATASETS \"[['name', 'coco', 'annotations.json', 'images']]\"."
        )
    metadata = MetadataCatalog.get(name)
    source = metadata.get("json_file") or metadata.get("dirname") or ""
    if source and not os.path.exists(source):
        raise InputError(
            f"{source}: the annotations of the data set '{name}' are not there. Check "
            "VIRTEX.DATASETS, or for detectron2's own data sets DETECTRON2_DATASETS."
        )
    if source and metadata.get("evaluator_type") == "coco":
        found = check_coco_file(
            source,
            metadata.image_root,
            cfg.MODEL.MASK_ON,
            cfg.INPUT.MASK_FORMAT,
            cfg.VIRTEX.MAX_BAD_BOX_SHARE,
        )
        if name in cfg.DATASETS.TRAIN and not found.num_annotations:
            raise InputError(f"{source}: `annotations` is empty; there is nothing to learn.")
        size = (
            f"{found.num_images} images, {found.num_annotations} annotations, "
            f"{len(found.categories)} categories"
        )
        return DataSet(name, source, found.categories, size)
    classes = dict(enumerate(metadata.get("thing_classes") or []))
    return DataSet(name, source, classes, f"{len(classes)} categories")


def _check_classes(cfg: CfgNode, datasets: list[DataSet]) -> None:
    first, *others = datasets
    for other in others:
        if other.categories != first.categories:
            raise InputError(
                f"DATASETS: '{first.name}' ({first.source}) and '{other.name}' ({other.source}) "
                "have different categories: "
                f"{_difference(first.categories, other.categories)}. One detector's classes must "
                "mean the same in all of them: give equal ids to equal names."
            )
    count, configured = len(first.categories), cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if configured == -1:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = count
    elif configured != count:
        names = list(first.categories.values())
        shown = ", ".join(names[:10]) + (", ..." if count > 10 else "")
        raise InputError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {configured}, but '{first.name}' ({first.source}) has "
            f"{count} categories: {shown}. Use MODEL.ROI_HEADS.NUM_CLASSES {count}, or -1."
        )


def _difference(first: dict[int, str], other: dict[int, str]) -> str:
    told = [
        f"id {number} is {first.get(number, 'absent')!r} and {other.get(number, 'absent')!r}"
        for number in sorted(first.keys() | other.keys())
        if first.get(number) != other.get(number)
    ]
    return "; ".join(told[:10]) + (f" and {len(told) - 10} more" if len(told) > 10 else "")
