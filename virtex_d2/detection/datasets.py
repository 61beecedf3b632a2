"""Data sets named in the config: registered, checked before a run depends on them, and read."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_utils
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES as V0_5
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES as V1
from detectron2.structures import BoxMode

from virtex_d2.annotations.masks import mask_faults
from virtex_d2.annotations.records import no_collection
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.annotations.usable import Use, require_usable
from virtex_d2.annotations.voc import VOC_CLASSES, classes_in
from virtex_d2.detection.detectors import check_detector, set_classes
from virtex_d2.detection.sources import read_catalog, require_known
from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError, nearest

logger = logging.getLogger(__name__)

_KEY = "VIRTEX.DATASETS"  # for messages
# Type -> what its entries hold behind it, for people, and detectron2's evaluator type.
_TYPES = {
    "coco": ("annotation file, image folder", "coco"),
    "lvis": ("annotation file, image folder", "lvis"),
    "voc": ("folder, split[, classes]", "pascal_voc"),
}
# LVIS's versions have other classes, and the same number means another thing in each.
LVIS_VERSIONS = {
    version: {category["id"]: category["name"] for category in table}
    for version, table in (("v0.5", V0_5), ("v1", V1))
}


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
        name, kind, source, rest, *classes = _entry(entry)
        metadata = {"evaluator_type": _TYPES[kind][1]}
        source = expanded(source, _KEY)
        if kind == "voc":
            taken = list(*classes) or list(VOC_CLASSES)
            if repeated := sorted({found for found in taken if taken.count(found) > 1}):
                raise InputError(
                    f"{_KEY}: '{name}' lists classes more than once: {', '.join(repeated)}."
                )
            # Whose metric AP is, as in detectron2: 11 points for VOC 2007, the area for all others.
            year = 2007 if "2007" in os.path.basename(os.path.normpath(source)) else 2012
            metadata |= {"dirname": source, "split": rest, "year": year, "thing_classes": taken}
            metadata["chosen_classes"] = bool(classes)
        else:
            metadata |= {"json_file": source, "image_root": expanded(rest, _KEY)}
            metadata["classes_from_file"] = True
        _register(name, metadata)


def log_datasets(datasets: list[DataSet]) -> None:
    """Say in the log what was found."""
    for dataset in datasets:
        logger.info("Data set %s: %s, %s", dataset.name, dataset.source, dataset.size)


@no_collection()
def load_records(name: str) -> list[dict[str, Any]]:
    """Read a data set of the catalog as detectron2's records; sets the classes of its metadata.

    detectron2's own loaders read the files' values as they are; LVIS's knows the classes by the
    data set's name, and polygons alone; VOC's knows .jpg, and no other classes.

    Returns:
        By image id (VOC: in the order of the split), difficult objects included, with polygons or
        compressed run-length masks, without the objects whose mask is none (of which the check
        allows a share). `category_id` is the place of the category among the sorted ids.
    """
    table = read_catalog(name)
    for problem in table.problems:
        if problem.kind in ("unreadable", "incomplete", "box-malformed"):
            raise InputError(f"{table.source}: {problem}. Was it changed after its check?")
    dropped = mask_faults(table)
    ids = list(table.categories)
    numbers = {key: number for number, key in enumerate(sorted(ids))}
    metadata = MetadataCatalog.get(name)
    if table.kind != "voc":  # whose classes are known before
        classes = [table.categories[key] for key in numbers]
        for key, value in (
            ("thing_classes", classes),
            ("thing_dataset_id_to_contiguous_id", numbers),
        ):
            if metadata.get(key) is None:  # detectron2's own data sets know theirs
                metadata.set(**{key: value})
    places = [numbers[ids[of]] if of >= 0 else -1 for of in table.category_of.tolist()]
    rows = table.objects_by_image()
    images = range(len(rows))
    if table.kind != "voc":
        images = sorted(images, key=table.image_ids.__getitem__)
    sizes = table.sizes.astype(int).tolist()
    return [
        {
            "file_name": table.files[image],
            "height": sizes[image][1],
            "width": sizes[image][0],
            "image_id": table.image_ids[image],
            "annotations": [
                _annotation(table, row, places[row])
                for row in rows[image].tolist()
                if row not in dropped and places[row] >= 0
            ],
        }
        for image in images
    ]


def check_fraction(fraction: float, name: str = "", num_images: int = 0) -> None:
    """Raise InputError if the fraction is not in (0, 1], or comes to none of the images."""
    if not 0 < fraction <= 1:
        raise InputError(f"VIRTEX.FRACTION {fraction}: expected more than 0, up to 1 for all.")
    if name and not round(fraction * num_images):
        raise InputError(
            f"VIRTEX.FRACTION {fraction} of the {num_images} images of '{name}' is none: use at "
            f"least {1 / num_images:.2g}."
        )


def take_fraction(records: list[dict[str, Any]], fraction: float, seed: int) -> list[dict]:
    """Take the first records of an order that is drawn by image ids; they keep their own order.

    Subsets of one seed are nested: 2 % of the images are among 5 %. An image's place in the order
    depends on its `image_id` and the seed alone, so that sets that share images and ids, such as
    COCO and LVIS, agree on which come first.

    Args:
        records: detectron2's, each with `image_id`.
        fraction: in (0, 1], rounded to the nearest number of images.
        seed: any number.
    """

    def luck(place: int) -> bytes:
        return hashlib.sha256(f"{seed}:{records[place]['image_id']}".encode()).digest()

    drawn = sorted(range(len(records)), key=luck)[: round(fraction * len(records))]
    return [records[place] for place in sorted(drawn)]


def register_fraction(name: str, fraction: float, seed: int) -> str:
    """Register a fraction of a data set under a name of its own, which is returned.

    For the catalog's readers it is a data set like any other: with the classes of the whole.
    """
    if fraction == 1:
        return name
    part = f"{name}@{fraction!r}-of-seed-{seed}"
    if part not in DatasetCatalog:
        DatasetCatalog.register(part, lambda: _load_fraction(name, part, fraction, seed))
    return part


def _load_fraction(name: str, part: str, fraction: float, seed: int) -> list[dict[str, Any]]:
    records = DatasetCatalog.get(name)
    check_fraction(fraction, name, len(records))
    # Known after loading: COCO's loader finds them in the file.
    MetadataCatalog.get(part).set(thing_classes=MetadataCatalog.get(name).thing_classes)
    taken = take_fraction(records, fraction, seed)
    logger.info(
        "VIRTEX.FRACTION %g (VIRTEX.FRACTION_SEED %d): %d of %d images of %s, %d of %d annotations",
        *(fraction, seed, len(taken), len(records), name),
        *(sum(len(record["annotations"]) for record in some) for some in (taken, records)),
    )
    if not any(not item.get("iscrowd") for record in taken for item in record["annotations"]):
        raise InputError(
            f"VIRTEX.FRACTION {fraction}: none of the {len(taken)} images of '{name}' that it "
            "selects has an annotation to learn from. Use a larger fraction, or another "
            "VIRTEX.FRACTION_SEED."
        )
    return taken


def _annotation(table: AnnotationTable, row: int, category: int) -> dict[str, Any]:
    mode = BoxMode.XYXY_ABS if table.kind == "voc" else BoxMode.XYWH_ABS
    annotation = {"bbox": table.written[row], "bbox_mode": mode, "category_id": category}
    if table.kind == "voc":
        return annotation
    annotation["iscrowd"] = int(table.crowd[row])
    mask, points = table.segmentations[row], table.keypoints[row]
    if mask is not None:
        if isinstance(mask, dict) and isinstance(mask["counts"], list):
            mask = mask_utils.frPyObjects(mask, *mask["size"])  # bytes, as detectron2's mapper
        annotation["segmentation"] = mask
    if points:
        # from the pixel's number to its centre, as in detectron2; each third is a visibility
        annotation["keypoints"] = [
            value if place % 3 == 2 else value + 0.5 for place, value in enumerate(points)
        ]
    return annotation


def _register(name: str, metadata: dict[str, Any]) -> None:
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if {key: known.get(key) for key in metadata} != metadata:
            raise InputError(
                f"{_KEY}: the name '{name}' is taken by another data set; choose another."
            )
        return
    DatasetCatalog.register(name, lambda: load_records(name))
    MetadataCatalog.get(name).set(**metadata)


def _entry(entry: Any) -> Sequence[Any]:
    """(name, type, two texts[, classes]) of a well-formed entry."""
    if (
        not _is_list(entry)
        or len(entry) < 2
        or not all(isinstance(part, str) for part in entry[:4])
    ):
        raise InputError(
            f"{_KEY}: expected entries [name, type, ...], such as ['mine', 'coco', "
            f"'annotations.json', 'images'], found {entry!r}."
        )
    name, kind, *rest = entry
    if kind not in _TYPES:
        raise InputError(
            f"{_KEY}: '{name}' has the type '{kind}'; expected one of {', '.join(_TYPES)}."
            f"{nearest(kind, _TYPES)}"
        )
    takes_classes = kind == "voc" and len(rest) == 3 and _is_list(rest[2]) and rest[2]
    if len(rest) != 2 and not (takes_classes and all(isinstance(c, str) for c in rest[2])):
        raise InputError(
            f"{_KEY}: expected entries [name, '{kind}', {_TYPES[kind][0]}], found {entry!r}."
        )
    return entry


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked(name: str, cfg: CfgNode, eval_only: bool) -> DataSet:
    require_known(name)
    metadata = MetadataCatalog.get(name)
    source = metadata.get("json_file") or metadata.get("dirname") or ""
    if source and not os.path.exists(source):
        raise InputError(
            f"{source}: the annotations of the data set '{name}' are not there. Check "
            f"{_KEY}, or for detectron2's own data sets DETECTRON2_DATASETS."
        )
    known_types = [evaluator_type for _, evaluator_type in _TYPES.values()]
    if not source or metadata.get("evaluator_type") not in known_types:
        classes = dict(enumerate(metadata.get("thing_classes") or []))
        return DataSet(name, source, classes, f"{len(classes)} categories")
    trains = name in cfg.DATASETS.TRAIN and not eval_only
    table = read_catalog(name)
    if table.unlisted and not metadata.get("chosen_classes", False):
        _refuse_unlisted(table, metadata)
    use = Use(
        trains,
        name in cfg.DATASETS.TEST,
        cfg.MODEL.MASK_ON,
        cfg.INPUT.MASK_FORMAT,
        cfg.VIRTEX.MAX_BAD_BOX_SHARE,
    )
    require_usable(table, use)
    categories = dict(sorted(table.categories.items()))
    _check_known_classes(name, metadata, categories)
    if DatasetCatalog[name].__module__.startswith("detectron2."):  # read by what has checked it
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, lambda: load_records(name))
    if trains:
        if not (~table.crowd & (table.category_of >= 0)).any():
            raise InputError(
                f"{source}: '{name}' has no annotation that is not a crowd; there is nothing to "
                "learn."
            )
        check_fraction(cfg.VIRTEX.FRACTION, name, len(table.image_ids))
    return DataSet(name, source, categories, "; ".join(_facts(table, categories)))


def _facts(table: AnnotationTable, categories: dict[int, str]) -> list[str]:
    """What people should know of a data set, a few words each."""
    count = int((table.category_of >= 0).sum())
    size = f"{len(table.image_ids)} images, {count} annotations, {len(categories)} categories"
    facts = [size]
    if table.kind == "lvis":
        version = _lvis_version(categories)
        facts.append(f"LVIS {version}" if version else "categories of its own")
    if not table.has_truth:
        facts.append("no annotations: predictions only, no AP")
    if table.unlisted:
        told = ", ".join(f"{name} {count}" for name, count in table.unlisted.items())
        facts.append(f"objects of classes that are not listed are left out: {told}")
    if table.kind == "voc":
        found = {list(categories)[number] for number in set(table.category_of.tolist()) - {-1}}
        if lacking := [name for number, name in categories.items() if number not in found]:
            hints = "".join(nearest(name, table.unlisted) for name in lacking)
            facts.append(f"no object of {', '.join(lacking)}{hints}")
    return facts


def _refuse_unlisted(table: AnnotationTable, metadata: Metadata) -> None:
    raise InputError(
        f"{metadata.dirname}: the split '{metadata.split}' has classes that are none of VOC's 20: "
        f"{', '.join(list(table.unlisted)[:20])}. Say in VIRTEX.DATASETS which classes to detect, "
        f"in the same order for every data set: ['name', 'voc', '{metadata.dirname}', "
        f"'{metadata.split}', {classes_in(metadata.dirname)!r}] would take all that the folder has."
    )


def _lvis_version(categories: dict[int, str]) -> str:
    return next((version for version, known in LVIS_VERSIONS.items() if known == categories), "")


def _check_known_classes(name: str, metadata: Metadata, categories: dict[int, str]) -> None:
    """detectron2's own data sets have fixed classes, and its loaders stop on others."""
    if metadata.evaluator_type == "coco":
        known, classes = metadata.get("thing_classes"), list(categories.values())
        if known is not None and list(known) != classes:
            raise InputError(
                f"{metadata.json_file}: '{name}' is detectron2's data set of {len(known)} classes, "
                f"but the file has {len(classes)} categories: "
                f"{', '.join(map(str, classes[:10]))}. Give it a name of its own with "
                "VIRTEX.DATASETS."
            )
    version = next((version for version in LVIS_VERSIONS if f"_{version}_" in name), "")
    if metadata.evaluator_type != "lvis" or metadata.get("classes_from_file") or not version:
        return
    found = _lvis_version(categories)
    if found != version and "cocofied" not in name:
        what = f"LVIS {found}" if found else f"{len(categories)} categories of another list"
        raise InputError(
            f"{metadata.json_file}: '{name}' is LVIS {version} ({len(LVIS_VERSIONS[version])} "
            f"categories), but the file holds {what}. Its classes would mean something else: put "
            "the right file there, or name the file with VIRTEX.DATASETS."
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
