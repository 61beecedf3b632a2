"""Data sets named in the config: registered, and checked before a run depends on them."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from virtex_d2.runtime.errors import InputError, nearest


@dataclass(frozen=True)
class CocoFile:
    """What a checked COCO-format annotation file holds.

    Attributes:
        path: of the file.
        categories: names by category id, in the order of the ids.
        num_images, num_annotations: how many it lists.
    """

    path: str
    categories: dict[int, str]
    num_images: int
    num_annotations: int


def register_datasets(cfg: CfgNode) -> None:
    """Register VIRTEX.DATASETS under their names and check all data sets of the run.

    A name may be registered again with the same files; detectron2's own names stay as they are.

    Raises:
        InputError: an entry is malformed, a file is missing or inconsistent, an image is absent,
            the classes of training and test sets differ, or their number is not
            MODEL.ROI_HEADS.NUM_CLASSES.
    """
    checked: dict[str, CocoFile] = {}
    for entry in cfg.VIRTEX.DATASETS:
        name, kind, annotations, image_root = _entry(entry)
        checked[name] = TYPES[kind](name, annotations, image_root, cfg.MODEL.MASK_ON)
    used = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in used:
        if name not in DatasetCatalog:
            known = [known for known in DatasetCatalog.list() if known != name]
            raise InputError(
                f"DATASETS: '{name}' is not a known data set.{nearest(name, known)} Name its files "
                "with VIRTEX.DATASETS \"[['name', 'coco', 'annotations.json', 'images']]\"."
            )
    _check_classes(cfg, {name: checked[name] for name in used if name in checked})


def check_coco_file(annotations: str, image_root: str, with_masks: bool) -> CocoFile:
    """Read a COCO-format detection file and check all that a run depends on.

    Args:
        annotations: the JSON file.
        image_root: the folder of its images.
        with_masks: whether every annotation needs a segmentation.

    Raises:
        InputError: with the file, the number of records that are wrong, and the first ten.
    """
    content = _read_json(annotations)
    images, records, categories = (
        _list(content, key, annotations) for key in ("images", "annotations", "categories")
    )
    names = {category["id"]: category["name"] for category in categories}
    by_id = {image["id"]: image for image in images}
    if not images:
        raise InputError(f"{annotations}: it lists no images.")

    absent = _absent_files(image_root, [image["file_name"] for image in images])
    _refuse(
        annotations,
        absent,
        f"of its {len(images)} images are not in {image_root}",
        "Check the image folder, or remove them from the file.",
    )
    _refuse(
        annotations,
        [
            f"annotation {r['id']} (category_id {r['category_id']})"
            for r in records
            if r["category_id"] not in names
        ],
        f"annotations have a category_id that is not in `categories` ({sorted(names)[:20]})",
        "Add the category, or remove them.",
    )
    _refuse(
        annotations,
        [
            f"annotation {r['id']} (image_id {r['image_id']})"
            for r in records
            if r["image_id"] not in by_id
        ],
        "annotations have an image_id that is not in `images`",
        "The file is cut short, or two files were mixed.",
    )
    _refuse(
        annotations,
        [problem for r in records if (problem := _box_problem(r, by_id[r["image_id"]]))],
        "annotations have a box that is empty or outside its image",
        "Boxes are [x, y, width, height] in pixels; correct or remove them.",
    )
    if with_masks:
        _refuse(
            annotations,
            [f"annotation {r['id']}" for r in records if not r.get("segmentation")],
            "annotations have no segmentation, which a mask head needs",
            "Add them, or set MODEL.MASK_ON False.",
        )
    return CocoFile(annotations, dict(sorted(names.items())), len(images), len(records))


def _register_coco(name: str, annotations: str, image_root: str, with_masks: bool) -> CocoFile:
    checked = check_coco_file(annotations, image_root, with_masks)
    source = {"json_file": annotations, "image_root": image_root}
    if name in DatasetCatalog:
        before = MetadataCatalog.get(name)
        if {key: before.get(key) for key in source} != source:
            raise InputError(
                f"VIRTEX.DATASETS: the name '{name}' is taken by another data set; choose another."
            )
        return checked
    DatasetCatalog.register(name, lambda: load_coco_json(annotations, image_root, name))
    MetadataCatalog.get(name).set(
        **source, evaluator_type="coco", thing_classes=list(checked.categories.values())
    )
    return checked


# Type -> registers a data set of it and returns what was found.
TYPES: dict[str, Callable[[str, str, str, bool], CocoFile]] = {"coco": _register_coco}


def _entry(entry: Any) -> tuple[str, str, str, str]:
    is_list = isinstance(entry, Sequence) and not isinstance(entry, str)
    if not is_list or len(entry) != 4 or not all(isinstance(part, str) for part in entry):
        raise InputError(
            "VIRTEX.DATASETS: expected [name, type, annotation file, image folder], found "
            f"{entry!r}."
        )
    name, kind, annotations, image_root = entry
    if kind not in TYPES:
        raise InputError(
            f"VIRTEX.DATASETS: '{name}' has type {kind!r}, which is not one of "
            f"{', '.join(TYPES)}.{nearest(kind, TYPES)}"
        )
    return name, kind, annotations, image_root


def _check_classes(cfg: CfgNode, checked: dict[str, CocoFile]) -> None:
    if not checked:
        return
    first_name, first = next(iter(checked.items()))
    for name, other in checked.items():
        if other.categories != first.categories:
            different = sorted(set(other.categories.items()) ^ set(first.categories.items()))[:10]
            raise InputError(
                f"DATASETS: the categories of '{name}' ({other.path}) are not those of "
                f"'{first_name}' ({first.path}); they differ in {different}. A detector's classes "
                "must mean the same in training and in testing."
            )
    count, configured = len(first.categories), cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if configured != count:
        names = list(first.categories.values())
        shown = ", ".join(names[:10]) + (", ..." if count > 10 else "")
        raise InputError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {configured}, but '{first_name}' ({first.path}) has "
            f"{count} categories: {shown}. Use MODEL.ROI_HEADS.NUM_CLASSES {count}."
        )


def _box_problem(record: dict, image: dict) -> str:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return f"annotation {record.get('id')}: bbox {box}"
    x, y, width, height = box
    # a pixel of rounding is common, also in the official files
    inside = (
        x >= -1
        and y >= -1
        and x + width <= image["width"] + 1
        and (y + height <= image["height"] + 1)
    )
    if width > 0 and height > 0 and inside:
        return ""
    return (
        f"annotation {record['id']}: bbox {box} in the {image['width']}x{image['height']} image "
        f"{image['file_name']}"
    )


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise InputError(
            f"{path}: expected JSON, but it is cut short or not JSON ({error}). Copy it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
    return content


# What each record must have for the checks to speak of it.
_REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _list(content: dict, key: str, path: str) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list):
        raise InputError(
            f"{path}: expected a list `{key}`, found {sorted(content)}. Is it a COCO-format "
            "detection file?"
        )
    lacking = [
        f"{key}[{index}] lacks {', '.join(missing)}"
        for index, record in enumerate(records)
        if (missing := [name for name in _REQUIRED[key] if name not in record])
    ]
    _refuse(path, lacking, f"records of `{key}` are incomplete", "Complete or remove them.")
    return records


def _absent_files(image_root: str, names: list[str]) -> list[str]:
    """One listing a folder, not one question an image: network file systems are slow to ask."""
    present: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, base = os.path.split(os.path.join(image_root, name))
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in present[folder]:
            absent.append(name)
    return absent


def _refuse(path: str, items: list[str], what: str, advice: str) -> None:
    if items:
        first = "; ".join(items[:10])
        raise InputError(f"{path}: {len(items)} {what}; the first: {first}. {advice}")
