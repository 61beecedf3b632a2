"""Data sets named in the config: registered, and checked before a run depends on them."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from virtex_d2.annotations.coco_file import check_coco_file, load_json_file
from virtex_d2.annotations.lvis_file import check_lvis_file, check_version, without_version
from virtex_d2.annotations.use import Found, Use, use_of
from virtex_d2.annotations.voc_folder import VOC_CLASSES, check_voc_folder, load_voc_folder
from virtex_d2.detection.detectors import check_detector, set_classes
from virtex_d2.detection.fraction import check_fraction
from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError, nearest

logger = logging.getLogger(__name__)

_KEY = "VIRTEX.DATASETS"  # for messages


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
    names (coco_2017_train, ...) need no entry. The detector's NUM_CLASSES of -1 becomes the number
    of their categories, in `cfg`.
    """
    register_entries(cfg)
    check_detector(cfg, eval_only)
    required = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[required]:
        raise InputError(
            f"DATASETS.{required} is empty; name the data sets to use, for example "
            f"DATASETS.{required} \"('name',)\"."
        )
    check_fraction(cfg.VIRTEX.FRACTION)
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    checked = [_checked(name, cfg, eval_only) for name in dict.fromkeys(names)]
    _check_classes(cfg, checked)
    return checked


def register_entries(cfg: CfgNode) -> None:
    """Make VIRTEX.DATASETS known to detectron2's catalog; what they hold is not looked at."""
    for entry in cfg.VIRTEX.DATASETS:
        name, kind, rest = _entry(entry)
        TYPES[kind].register(name, *rest)


def log_datasets(datasets: list[DataSet]) -> None:
    """Say in the log what was found."""
    for dataset in datasets:
        logger.info("Data set %s: %s, %s", dataset.name, dataset.source, dataset.size)


@dataclass(frozen=True)
class DatasetType:
    """A format that VIRTEX.DATASETS takes.

    Attributes:
        entry: what its entries hold, for people.
        evaluator_type: of its metadata, as for detectron2's own data sets of that format.
        register: (name, *the entry behind the type) -> None.
        check: (name, its metadata, use) -> what it holds.
    """

    entry: str
    evaluator_type: str
    register: Callable[..., None]
    check: Callable[[str, Metadata, Use], Found]


def _register(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if {key: known.get(key) for key in metadata} != metadata:
            raise InputError(
                f"VIRTEX.DATASETS: the name '{name}' is taken by another data set; choose another."
            )
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def _register_coco(name: str, annotations: str, image_root: str) -> None:
    annotations, image_root = (expanded(path, _KEY) for path in (annotations, image_root))
    _register(
        name,
        lambda: load_json_file("coco", annotations, image_root, name),
        json_file=annotations,
        image_root=image_root,
        evaluator_type="coco",
    )


def _register_lvis(name: str, annotations: str, image_root: str) -> None:
    annotations, image_root = (expanded(path, _KEY) for path in (annotations, image_root))
    _register(
        name,
        lambda: load_json_file("lvis", annotations, image_root, name),
        json_file=annotations,
        image_root=image_root,
        classes_from_file=True,
        evaluator_type="lvis",
    )


def _register_voc(name: str, folder: str, split: str, classes: Sequence[str] = ()) -> None:
    folder = expanded(folder, _KEY)
    repeated = sorted({found for found in classes if list(classes).count(found) > 1})
    if repeated:
        raise InputError(
            f"VIRTEX.DATASETS: '{name}' lists classes more than once: {', '.join(repeated)}."
        )
    taken = list(classes or VOC_CLASSES)
    _register(
        name,
        lambda: load_voc_folder(folder, split, taken),
        dirname=folder,
        split=split,
        # Whose metric AP is, as in detectron2: 11 points for VOC 2007, the area for all others.
        year=2007 if "2007" in os.path.basename(os.path.normpath(folder)) else 2012,
        thing_classes=taken,
        chosen_classes=bool(classes),
        evaluator_type="pascal_voc",
    )


def _check_coco(name: str, metadata: Metadata, use: Use) -> Found:
    found = check_coco_file(metadata.json_file, metadata.image_root, use)
    _check_known_classes(name, metadata, list(found.categories.values()))
    _read_as_checked("coco", name, metadata)
    return found


def _check_lvis(name: str, metadata: Metadata, use: Use) -> Found:
    found = check_lvis_file(metadata.json_file, metadata.image_root, use)
    if not metadata.get("classes_from_file", False):
        check_version(name, metadata.json_file, found.categories)
    _read_as_checked("lvis", name, metadata)
    return found


def _read_as_checked(kind: str, name: str, metadata: Metadata) -> None:
    """Let a data set that detectron2 has registered be read by what has checked it."""
    if DatasetCatalog[name].__module__.startswith("detectron2."):
        path, image_root = metadata.json_file, metadata.image_root
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, lambda: load_json_file(kind, path, image_root, name))


def _check_voc(name: str, metadata: Metadata, use: Use) -> Found:
    chosen = metadata.get("chosen_classes", False)
    return check_voc_folder(metadata.dirname, metadata.split, metadata.thing_classes, chosen, use)


_JSON_ENTRY = "annotation file, image folder"
TYPES: dict[str, DatasetType] = {
    "coco": DatasetType(_JSON_ENTRY, "coco", _register_coco, _check_coco),
    "lvis": DatasetType(_JSON_ENTRY, "lvis", _register_lvis, _check_lvis),
    "voc": DatasetType("folder, split[, classes]", "pascal_voc", _register_voc, _check_voc),
}


def _entry(entry: Any) -> tuple[str, str, list]:
    """(name, type, what follows) of a well-formed entry."""
    if (
        not _is_list(entry)
        or len(entry) < 2
        or not all(isinstance(part, str) for part in entry[:4])
    ):
        raise InputError(
            "VIRTEX.DATASETS: expected entries [name, type, ...], such as ['mine', 'coco', "
            f"'annotations.json', 'images'], found {entry!r}."
        )
    name, kind, *rest = entry
    if kind not in TYPES:
        raise InputError(
            f"VIRTEX.DATASETS: '{name}' has the type '{kind}'; expected one of {', '.join(TYPES)}."
            f"{nearest(kind, TYPES)}"
        )
    takes_classes = kind == "voc" and len(rest) == 3 and _is_list(rest[2]) and rest[2]
    if len(rest) != 2 and not (takes_classes and all(isinstance(c, str) for c in rest[2])):
        raise InputError(
            f"VIRTEX.DATASETS: expected entries [name, '{kind}', {TYPES[kind].entry}], found "
            f"{entry!r}."
        )
    return name, kind, list(rest)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked(name: str, cfg: CfgNode, eval_only: bool) -> DataSet:
    if name not in DatasetCatalog:
        known = [known for known in DatasetCatalog.list() if not known.startswith("__")]
        raise InputError(
            f"DATASETS: '{name}' is not a known data set."
            f"{without_version(name) or nearest(name, known)} Name data of your own with "
            "VIRTEX.DATASETS \"[['name', 'coco', 'annotations.json', 'images']]\"."
        )
    metadata = MetadataCatalog.get(name)
    source = metadata.get("json_file") or metadata.get("dirname") or ""
    if source and not os.path.exists(source):
        raise InputError(
            f"{source}: the annotations of the data set '{name}' are not there. Check "
            "VIRTEX.DATASETS, or for detectron2's own data sets DETECTRON2_DATASETS."
        )
    by_evaluator = {kind.evaluator_type: kind for kind in TYPES.values()}
    kind = by_evaluator.get(metadata.get("evaluator_type"))
    if not source or kind is None:
        classes = dict(enumerate(metadata.get("thing_classes") or []))
        return DataSet(name, source, classes, f"{len(classes)} categories")
    found = kind.check(name, metadata, use_of(name, cfg, eval_only))
    if name in cfg.DATASETS.TRAIN and not eval_only:
        if not found.num_singles:
            raise InputError(
                f"{source}: '{name}' has no annotation that is not a crowd; there is nothing to "
                "learn."
            )
        check_fraction(cfg.VIRTEX.FRACTION, name, found.num_images)
    return DataSet(name, source, found.categories, str(found))


def _check_known_classes(name: str, metadata: Metadata, classes: list[str]) -> None:
    """detectron2's own data sets have fixed classes, and its loader stops on others."""
    known = metadata.get("thing_classes")
    if known is not None and list(known) != classes:
        raise InputError(
            f"{metadata.json_file}: '{name}' is detectron2's data set of {len(known)} classes, but "
            f"the file has {len(classes)} categories: {', '.join(map(str, classes[:10]))}. Give it "
            "a name of its own with VIRTEX.DATASETS."
        )


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
    source = f"'{first.name}' ({first.source})"
    set_classes(cfg, source, list(map(str, first.categories.values())))


def _difference(first: dict[int, str], other: dict[int, str]) -> str:
    told = [
        f"id {number} is {first.get(number, 'absent')!r} and {other.get(number, 'absent')!r}"
        for number in sorted(first.keys() | other.keys())
        if first.get(number) != other.get(number)
    ]
    return "; ".join(told[:10]) + (f" and {len(told) - 10} more" if len(told) > 10 else "")
