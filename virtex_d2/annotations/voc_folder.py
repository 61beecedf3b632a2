"""Pascal VOC's layout: Annotations/*.xml, ImageSets/Main/<split>.txt and JPEGImages, boxes only."""

import contextlib
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode

from virtex_d2.annotations.problems import box_fits, refuse, refuse_more_than
from virtex_d2.annotations.use import Found, Use
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_text

VOC_CLASSES = tuple(CLASS_NAMES)


@dataclass(frozen=True)
class VocObject:
    """An `object` of an XML file.

    Attributes:
        name: of its class.
        box: x0, y0, x1, y1 in pixels from the image's corner, the right and lower side excluded.
            The XML counts pixels from 1 and includes the last one.
        difficult: whether it is hard to recognise, and left out of the evaluation.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """An image of a split: its id, file, size in pixels and objects."""

    image_id: str
    file_name: str
    width: int
    height: int
    objects: tuple[VocObject, ...]


def read_voc_folder(folder: str, split: str) -> list[VocImage]:
    """The images of a split, in the order of its list."""
    names = split_ids(folder, split)
    images = os.path.join(folder, "JPEGImages")
    files = _files_by_stem(images)
    refuse(
        folder,
        [name for name in names if name not in files],
        f"images of the split '{split}' are not in JPEGImages",
        "Add them, or remove them from the list.",
    )
    annotations = [os.path.join(folder, "Annotations", f"{name}.xml") for name in names]
    found, problems = [], []
    for name, path in zip(names, annotations):
        try:
            found.append(_read_xml(name, path, os.path.join(images, files[name])))
        except (ET.ParseError, OSError, ValueError) as error:
            problems.append(f"{name}.xml ({getattr(error, 'strerror', None) or error})")
    refuse(
        os.path.join(folder, "Annotations"),
        problems,
        f"files of the split '{split}' cannot be used",
        "Expected size/width, size/height and for each object name and bndbox with xmin, ymin, "
        "xmax, ymax.",
    )
    return found


def check_voc_folder(
    folder: str, split: str, classes: Sequence[str], chosen: bool, use: Use
) -> Found:
    """Read a split and check all that a run depends on.

    Args:
        folder: with Annotations, ImageSets and JPEGImages.
        split: a name in ImageSets/Main.
        classes: of the detector, in their order.
        chosen: whether the user named them: objects of others are left out then, and counted. Else
            another class is an error.
        use: what the run does with it.
    """
    if use.masks:
        raise InputError(
            f"{folder}: VOC's XML files have boxes and no masks, which MODEL.MASK_ON True needs. "
            "Set MODEL.MASK_ON False."
        )
    images = read_voc_folder(folder, split)
    counts = Counter(item.name for image in images for item in image.objects)
    others = {name: count for name, count in sorted(counts.items()) if name not in classes}
    if others and not chosen:
        _refuse_others(folder, split, others)
    _check_boxes(folder, images, sum(counts.values()), use)
    notes = []
    if others:
        told = ", ".join(f"{name} {count}" for name, count in others.items())
        notes.append(f"objects of classes that are not listed are left out: {told}")
    if lacking := [name for name in classes if not counts[name]]:
        hints = "".join(nearest(name, others) for name in lacking)
        notes.append(f"no object of {', '.join(lacking)}{hints}")
    kept = sum(counts[name] for name in classes)
    return Found(dict(enumerate(classes)), len(images), kept, kept, tuple(notes))


def load_voc_folder(folder: str, split: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A split as detectron2's records, difficult objects included as in its own loader.

    That loader reads VOC's official folders alike; this one also takes other image suffixes, other
    classes (which it leaves out) and splits of one image.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    return [
        {
            "file_name": image.file_name,
            "image_id": image.image_id,
            "height": image.height,
            "width": image.width,
            "annotations": [
                {
                    "category_id": numbers[item.name],
                    "bbox": list(item.box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                }
                for item in image.objects
                if item.name in numbers
            ],
        }
        for image in read_voc_folder(folder, split)
    ]


def split_list(folder: str, split: str) -> str:
    """The path of a split's list of images."""
    return os.path.join(folder, "ImageSets", "Main", f"{split}.txt")


def split_ids(folder: str, split: str) -> list[str]:
    """The ids of a split's images, in the order of its list."""
    path = split_list(folder, split)
    if not os.path.isfile(path):
        raise InputError(_no_split(folder, split, path))
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: is empty; there is nothing to train or test on.")
    # The lists of one class (car_trainval.txt) say -1, 0 or 1 behind each id.
    marked = [
        name for name in names if len(name.split()) == 2 and name.split()[1].lstrip("-") in "01"
    ]
    advice = "Name the split alone, such as trainval, and not the list of a class."
    refuse(path, marked, "lines have a mark behind the image's id", advice)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    refuse(path, repeated, "images are listed more than once", "List each once.")
    return names


def _no_split(folder: str, split: str, path: str) -> str:
    lists = os.path.dirname(path)
    if not os.path.isdir(lists):
        return (
            f"{folder}: expected a folder in Pascal VOC's layout (Annotations, ImageSets/Main, "
            "JPEGImages), and ImageSets/Main is not there. Check the folder; for detectron2's own "
            "data sets DETECTRON2_DATASETS."
        )
    present = sorted(name[:-4] for name in os.listdir(lists) if name.endswith(".txt"))
    return (
        f"{path}: expected the list of the split '{split}', found nothing there; there are "
        f"{', '.join(present[:20]) or 'none'}.{nearest(split, present)}"
    )


def _files_by_stem(folder: str) -> dict[str, str]:
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: expected the folder of the images, found none there.")
    return {os.path.splitext(name)[0]: name for name in sorted(os.listdir(folder))}


def _read_xml(image_id: str, path: str, file_name: str) -> VocImage:
    root = ET.parse(path).getroot()
    width, height = (int(_number(root, f"size/{side}")) for side in ("width", "height"))
    if width <= 0 or height <= 0:
        raise ValueError(f"its size is {width}x{height}")
    objects = tuple(_object(node) for node in root.findall("object"))
    return VocImage(image_id, file_name, width, height, objects)


def _object(node: ET.Element) -> VocObject:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    x0, y0, x1, y1 = (_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = node.findtext("difficult", "0").strip() == "1"
    return VocObject(name, (x0 - 1, y0 - 1, x1, y1), difficult)


def _number(node: ET.Element, path: str) -> float:
    text = node.findtext(path)
    try:
        return float(text)
    except (TypeError, ValueError):
        found = "is missing" if text is None else f"is {text!r}"
        raise ValueError(f"{path} {found}") from None


def _refuse_others(folder: str, split: str, others: Iterable[str]) -> None:
    raise InputError(
        f"{folder}: the split '{split}' has classes that are none of VOC's 20: "
        f"{', '.join(list(others)[:20])}. Say in VIRTEX.DATASETS which classes to detect, in the "
        f"same order for every data set: ['name', 'voc', '{folder}', '{split}', "
        f"{_classes_in(folder)!r}] would take all that the folder has."
    )


def _classes_in(folder: str) -> list[str]:
    """Of all splits: one of them may lack a class."""
    annotations = os.path.join(folder, "Annotations")
    names = set()
    for name in os.listdir(annotations):
        with contextlib.suppress(ET.ParseError, OSError):
            root = ET.parse(os.path.join(annotations, name)).getroot()
            names |= {(node.text or "").strip() for node in root.findall("object/name")}
    return sorted(names)


def _check_boxes(folder: str, images: list[VocImage], total: int, use: Use) -> None:
    refuse_more_than(
        use.max_bad_share,
        total,
        folder,
        [
            f"{image.image_id}.xml: {item.name} at {_as_written(item.box)} in the "
            f"{image.width}x{image.height} image"
            for image in images
            for item in image.objects
            if not box_fits(*item.box, image.width, image.height)
        ],
        "objects have a box that is empty or outside its image",
        "Boxes are pixels from 1 to width and height: correct or remove them.",
    )


def _as_written(box: tuple[float, float, float, float]) -> str:
    x0, y0, x1, y1 = box
    return f"xmin {x0 + 1:g}, ymin {y0 + 1:g}, xmax {x1:g}, ymax {y1:g}"
