"""Labelled images: a folder for each class, or iNaturalist's JSON."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode

from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_json
from virtex_d2.engine.images import IMAGE_SUFFIXES, images_in

logger = logging.getLogger(__name__)

_NAMED = 10  # records that an error names
_REQUIRED = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class LabelledImages:
    """One class for each image.

    Attributes:
        files: paths.
        labels: (N,) int64, indices into `classes`.
        classes: names.
        source: the folder or file, for messages.
    """

    files: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str


def load_datasets(cfg: CfgNode) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test set that DATA names, of the same classes."""
    read = {"folders": _read_folders, "inaturalist": _read_inaturalist}[cfg.DATA.FORMAT]
    require_folder(cfg.DATA.ROOT, "DATA.ROOT")
    train, test = (read(cfg.DATA.ROOT, split) for split in (cfg.DATA.TRAIN, cfg.DATA.TEST))
    if train.source == test.source:
        raise InputError(
            f"DATA.TRAIN and DATA.TEST are both {train.source}: what was learned would be tested "
            "on itself."
        )
    _refuse_one_class(train)
    return train, _with_classes(test, train)


def _refuse_one_class(train: LabelledImages) -> None:
    """Raise InputError if all images are of one class, so that every answer would be right."""
    name = train.classes[train.labels[0]]
    if (train.labels != train.labels[0]).any():
        return
    folder = os.path.join(train.source, name)
    advice = "Give images of two classes or more."
    if os.path.isdir(folder) and (inside := _subfolders(folder)):
        advice = (
            f"It holds the folders {', '.join(inside[:_NAMED])}: if these are the classes, "
            f"DATA.TRAIN is the folder below, {folder}, and DATA.TEST likewise."
        )
    raise InputError(
        f"{train.source}: all images are of one class, {name!r}: nothing to tell apart. {advice}"
    )


def require_folder(path: str, key: str) -> None:
    """Raise InputError if there is no such folder; the message names the config key."""
    if not os.path.isdir(path):
        raise InputError(
            f"{key} {path!r}: there is no such folder. Check the path, or for the configs' own "
            "data sets DETECTRON2_DATASETS."
        )


def _read_folders(root: str, split: str) -> LabelledImages:
    """A folder of images, with subfolders or not, for each class: ImageNet's layout."""
    folder = os.path.join(root, split)
    require_folder(folder, "DATA.ROOT with DATA.TRAIN or DATA.TEST")
    classes = _subfolders(folder)
    found: dict[str, list[str]] = {name: [] for name in classes}
    if not classes:
        raise InputError(
            f"{folder}: expected a folder of images for each class, found none in it. The script "
            "that sorts ImageNet's validation images into folders makes them."
        )
    for name in images_in(folder):
        name, slash, below = name.partition("/")
        if slash:  # no class is known of an image that lies beside the folders
            found[name].append(os.path.join(folder, name, below))
    if empty := [name for name in classes if not found[name]]:
        raise InputError(
            f"{folder}: {len(empty)} of its {len(classes)} class folders hold no image "
            f"({', '.join(IMAGE_SUFFIXES)}); the first: {', '.join(empty[:_NAMED])}. Remove them, "
            "or copy them again."
        )
    return LabelledImages(
        [file for name in classes for file in found[name]],
        np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes]),
        *(tuple(classes), folder),
    )


def _subfolders(folder: str) -> list[str]:
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if os.path.isdir(os.path.join(folder, name)))


def _read_inaturalist(root: str, split: str) -> LabelledImages:
    """A JSON file with images, annotations and categories, one annotation an image."""
    path = os.path.join(root, split)
    content = read_json(path)
    images, annotations, categories = (_records(content, key, path) for key in _REQUIRED)
    names = {image["id"]: image["file_name"] for image in images}
    # numbers before texts, which do not compare with them
    ids = sorted({c["id"] for c in categories}, key=lambda i: (isinstance(i, str), i))
    label_of = {category: label for label, category in enumerate(ids)}
    label: dict[object, int] = {}
    unknown, twice = [], []
    for annotation in annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in names or category not in label_of:
            unknown.append(f"image_id {image}, category_id {category}")
        elif image in label:
            twice.append(f"image_id {image}")
        else:
            label[image] = label_of[category]
    bare = [f"id {image}" for image in names if image not in label]
    _refuse(path, unknown, "annotations name an image or a category that the file does not have")
    _refuse(path, twice, "images have more than one annotation")
    _refuse(path, bare, "images have no annotation")
    _refuse(path, _repeated(image["id"] for image in images), "ids belong to more than one image")
    _refuse(path, _repeated(c["id"] for c in categories), "ids belong to more than one category")
    if not names:
        raise InputError(f"{path}: `images` is empty; there is nothing to learn or to test.")
    by_id = {category["id"]: str(category["name"]) for category in categories}
    return LabelledImages(
        [os.path.join(root, name) for name in names.values()],
        np.array([label[image] for image in names], np.int64),
        tuple(f"{category} {by_id[category]}" for category in ids),
        path,
    )


def _records(content: dict, key: str, path: str) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list):
        found = "nothing" if records is None else f"a {type(records).__name__}"
        raise InputError(
            f"{path}: expected a list in `{key}`, found {found}. Is it iNaturalist's JSON with "
            "images, annotations and categories? That of the test set has no annotations."
        )
    for place, record in enumerate(records):
        known = record if isinstance(record, dict) else {}
        kinds = {name: str if name == "file_name" else int | str for name in _REQUIRED[key]}
        lacking = [name for name, kind in kinds.items() if not isinstance(known.get(name), kind)]
        if lacking:
            raise InputError(
                f"{path}: `{key}`[{place}] lacks {', '.join(lacking)} (a number or text): "
                f"{record!r:.200}"
            )
    return records


def _repeated(ids: Iterable[object]) -> list[str]:
    seen: set[object] = set()
    return [f"id {one}" for one in ids if one in seen or seen.add(one)]


def _refuse(path: str, found: list[str], what: str) -> None:
    if found:
        first = "; ".join(found[:_NAMED])
        raise InputError(f"{path}: {len(found)} {what}; the first: {first}. Correct the file.")


def _with_classes(test: LabelledImages, train: LabelledImages) -> LabelledImages:
    """The test set with the training set's classes."""
    unknown = [name for name in test.classes if name not in set(train.classes)]
    if unknown:
        raise InputError(
            f"{test.source}: {len(unknown)} of its classes are not in {train.source}: "
            f"{', '.join(unknown[:_NAMED])}.{nearest(unknown[0], train.classes)} What is tested "
            "must have been learned."
        )
    untested = len(train.classes) - len(np.unique(test.labels))
    if untested:
        logger.warning(
            "%s: %d of the %d classes have no test image", test.source, untested, len(train.classes)
        )
    place = {name: label for label, name in enumerate(train.classes)}
    labels = np.array([place[test.classes[label]] for label in test.labels], np.int64)
    return LabelledImages(test.files, labels, train.classes, test.source)
