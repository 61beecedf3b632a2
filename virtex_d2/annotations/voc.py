"""Annotations in Pascal VOC's layout: a list of images, and an XML file for each."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import numpy as np
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from virtex_d2.annotations.table import AnnotationTable, Problem, number_boxes
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_text

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc_folder(
    folder: str,
    split: str,
    name: str,
    classes: Sequence[str] | None = None,
    chosen: bool = False,
) -> AnnotationTable:
    """Read Annotations/*.xml of the images that ImageSets/Main/<split>.txt lists.

    Corners are 1-based and inclusive in the files; boxes begin at 0, as in detectron2.

    Args:
        folder: with Annotations, ImageSets and JPEGImages.
        split: such as "trainval".
        name: of the data set.
        classes: its class names. None: VOC's twenty if they are enough, else those found.
        chosen: whether objects of other classes are left out on purpose.
    """
    path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    # Lists of one class have a second column, 1 or -1.
    stems = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not stems:
        raise InputError(f"{path}: it lists no image. Choose another split.")
    problems: list[Problem] = []
    sizes = np.full((len(stems), 2), np.nan)
    objects: list[_Object] = []
    for index, stem in enumerate(stems):
        root = _parse(os.path.join(folder, "Annotations", f"{stem}.xml"), problems)
        if root is None:
            continue
        size = [_number(root, f"size/{side}") for side in ("width", "height")]
        if all(np.isfinite(side) and side > 0 for side in size):
            sizes[index] = size
        else:
            why = "size/width and size/height are not two positive numbers"
            problems.append(Problem("incomplete", f"{stem}.xml", f"{stem}.jpg", why))
        objects += [
            _Object(index, f"{stem}.xml, object {number}", node)
            for number, node in enumerate(root.findall("object"), start=1)
        ]
    found = {item.name for item in objects if item.name}
    if classes is None:
        classes = CLASS_NAMES if found <= set(CLASS_NAMES) else sorted(found)
    position = {name: number for number, name in enumerate(classes)}
    table = AnnotationTable(
        name=name,
        kind="voc",
        source=path,
        categories=dict(enumerate(classes)),
        image_ids=list(stems),
        files=_files(os.path.join(folder, "JPEGImages"), stems),
        sizes=sizes,
        records=[item.record for item in objects],
        image_of=np.array([item.image for item in objects], np.int64),
        category_of=np.array([position.get(item.name, -1) for item in objects], np.int64),
        boxes=number_boxes([item.box for item in objects]),
        crowd=np.zeros(len(objects), bool),
        difficult=np.array([item.difficult for item in objects], bool),
        segmentations=[None] * len(objects),
        problems=problems,
    )
    for index in np.flatnonzero(table.category_of < 0):
        what = repr(objects[index].name) if objects[index].name else "missing"
        why = f"its name is {what}; the classes are {', '.join(list(classes)[:20])}"
        kind = "class-left-out" if chosen and objects[index].name else "category-unknown"
        problems.append(table.problem(kind, index, why))
    seen: set[str] = set()
    for stem, file in zip(stems, table.files):
        if stem in seen:
            problems.append(Problem("id-repeated", f"image {stem}", file, "listed before"))
        seen.add(stem)
    return table


def _files(folder: str, stems: Sequence[str]) -> list[str]:
    """The image of each stem; .jpg where there is none, or one of that suffix too."""
    names = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    there = {os.path.splitext(name)[0]: name for name in names if not name.endswith(".jpg")}
    there.update((name[:-4], name) for name in names if name.endswith(".jpg"))
    return [os.path.join(folder, there.get(stem, f"{stem}.jpg")) for stem in stems]


class _Object:
    """One <object> of a file: what can be read of it."""

    def __init__(self, image: int, record: str, node: ET.Element):
        self.image = image
        self.record = record
        self.name = (node.findtext("name") or "").strip()
        self.difficult = (node.findtext("difficult") or "").strip() == "1"
        x0, y0, x1, y1 = (_number(node, f"bndbox/{corner}") for corner in _CORNERS)
        self.box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]


def _parse(path: str, problems: list[Problem]) -> ET.Element | None:
    record, image = os.path.basename(path), f"{os.path.basename(path)[:-4]}.jpg"
    try:
        return ET.parse(path).getroot()
    except OSError as error:
        problems.append(Problem("unreadable", record, image, error.strerror or str(error)))
    except (ET.ParseError, ValueError, LookupError) as error:  # also of the declared encoding
        problems.append(Problem("unreadable", record, image, f"not XML: {error}"))
    return None


def _number(node: ET.Element, path: str) -> float:
    try:
        return float(node.findtext(path) or "nan")
    except ValueError:
        return float("nan")
