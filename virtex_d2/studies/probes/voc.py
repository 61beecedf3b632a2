"""PASCAL VOC as an image classification set: which classes each image holds."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES

from virtex_d2.annotations.voc import split_ids, split_list
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_text
from virtex_d2.studies.probes.datasets import require_folder

FOLDERS = ("Annotations", "ImageSets/Main", "JPEGImages")


@dataclass(frozen=True)
class VocImages:
    """A split's images and what they hold.

    Attributes:
        files: paths.
        labels: (N, C) int8: 1 the class is there; 0 all of its objects are difficult; -1 it is not
            there. As in VOC's own ImageSets/Main/<class>_<split>.txt.
        classes: the C names.
        source: the split's list.
    """

    files: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str


def load_voc(cfg: CfgNode) -> tuple[VocImages, VocImages]:
    """Read the splits DATA.TRAIN and DATA.TEST of DATA.ROOT, labelled from the XML files."""
    root = cfg.DATA.ROOT
    require_folder(root, "DATA.ROOT")
    lacking = [name for name in FOLDERS if not os.path.isdir(os.path.join(root, name))]
    if lacking:
        raise InputError(
            f"DATA.ROOT {root}: expected a VOC folder such as VOCdevkit/VOC2007, with "
            f"{', '.join(FOLDERS)}; there is no {', '.join(lacking)}."
        )
    classes = tuple(cfg.DATA.CLASSES or VOC_CLASSES)
    if len(set(classes)) < len(classes):
        raise InputError(f"DATA.CLASSES names a class twice: {', '.join(classes)}.")
    names = [split_ids(root, split) for split in (cfg.DATA.TRAIN, cfg.DATA.TEST)]
    shared = sorted(set(names[0]) & set(names[1]))
    if shared:
        raise InputError(
            f"{root}: {len(shared)} images are in both splits, {cfg.DATA.TRAIN} and "
            f"{cfg.DATA.TEST}; the first: {', '.join(shared[:10])}. Choose splits that are apart."
        )
    objects = [{name: _read_objects(root, name) for name in split} for split in names]
    _check_classes(root, objects, cfg.DATA.CLASSES)
    train, test = (
        VocImages(
            [os.path.join(root, "JPEGImages", f"{name}.jpg") for name in split],
            np.array([_labels(found[name], classes) for name in split], np.int8),
            classes,
            split_list(root, which),
        )
        for split, found, which in zip(names, objects, (cfg.DATA.TRAIN, cfg.DATA.TEST))
    )
    return train, test


def _read_objects(root: str, name: str) -> list[tuple[str, bool]]:
    """Class and difficulty of every object of an image."""
    path = os.path.join(root, "Annotations", f"{name}.xml")
    try:
        tree = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        raise InputError(
            f"{path}: expected VOC's XML, but it is cut short or not XML ({error}). Copy it again."
        ) from error
    objects = []
    for place, node in enumerate(tree.iter("object"), start=1):
        class_name = (node.findtext("name") or "").strip()
        difficult = (node.findtext("difficult") or "0").strip()
        if not class_name or difficult not in ("0", "1"):
            raise InputError(
                f"{path}: object {place} has the name {class_name!r} and difficult {difficult!r}; "
                "expected a class, and 0 or 1."
            )
        objects.append((class_name, difficult == "1"))
    return objects


def _check_classes(
    root: str, splits: Sequence[dict[str, list[tuple[str, bool]]]], wanted: Sequence[str]
) -> None:
    """Refuse classes of the annotations that nobody knows, or of the config that are not there."""
    first_image: dict[str, str] = {}
    for split in splits:
        for name, objects in split.items():
            for class_name, _ in objects:
                first_image.setdefault(class_name, name)
    if wanted:
        absent = [name for name in wanted if name not in first_image]
        if absent:
            raise InputError(
                f"DATA.CLASSES: no annotation of {root} has {', '.join(absent)}; it has "
                f"{', '.join(sorted(first_image))}.{nearest(absent[0], first_image)}"
            )
        return
    unknown = sorted(set(first_image) - set(VOC_CLASSES))
    if unknown:
        image = first_image[unknown[0]]
        raise InputError(
            f"{os.path.join(root, 'Annotations', image)}.xml: '{unknown[0]}' is none of VOC's "
            f"twenty classes ({len(unknown)} such). Name the classes to report with DATA.CLASSES "
            f'"{sorted(first_image)[:3]}".'
        )


def _labels(objects: Sequence[tuple[str, bool]], classes: Sequence[str]) -> list[int]:
    row = []
    for wanted in classes:
        easy = [not difficult for name, difficult in objects if name == wanted]
        row.append(1 if any(easy) else 0 if easy else -1)
    return row
