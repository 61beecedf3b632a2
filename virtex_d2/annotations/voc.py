"""Pascal VOC's layout: Annotations/*.xml, ImageSets/Main/<split>.txt and JPEGImages, boxes only."""

import contextlib
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence

import numpy as np
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from virtex_d2.annotations.table import AnnotationTable, Problem
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_text

VOC_CLASSES = tuple(CLASS_NAMES)
_NAMED = 10  # records that an error names


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
        classes: its class names. None: VOC's twenty if they are enough, else those found.
        chosen: whether objects of other classes are left out on purpose.
    """
    stems = _listed(folder, split)
    files = _files(os.path.join(folder, "JPEGImages"), stems)
    first = {stem: place for place, stem in reversed(list(enumerate(stems)))}
    problems = [
        Problem("id-repeated", f"image {stem}", files[place], "listed before")
        for place, stem in enumerate(stems)
        if first[stem] != place
    ]
    sizes = np.full((len(stems), 2), np.nan)
    records, names, image_of, written, difficult = [], [], [], [], []
    for index, (stem, file) in enumerate(zip(stems, files)):
        record = f"{stem}.xml"
        try:
            root = ET.parse(os.path.join(folder, "Annotations", record)).getroot()
        except (OSError, ET.ParseError, ValueError, LookupError) as error:
            why = getattr(error, "strerror", None) or f"not XML: {error}"
            problems.append(Problem("unreadable", record, file, why))
            continue
        try:
            sizes[index] = [_side(root, side) for side in ("width", "height")]
        except ValueError as error:
            problems.append(Problem("incomplete", record, file, str(error)))
        for number, node in enumerate(root.findall("object"), start=1):
            records.append(f"{record}, object {number}")
            names.append((node.findtext("name") or "").strip())
            image_of.append(index)
            difficult.append((node.findtext("difficult") or "").strip() == "1")
            try:
                written.append(_corners(node))
            except ValueError as error:
                written.append(None)
                problems.append(Problem("box-malformed", records[-1], file, str(error)))
    found = Counter(filter(None, names))
    if classes is None:
        classes = VOC_CLASSES if found.keys() <= set(VOC_CLASSES) else sorted(found)
    numbers = {name: number for number, name in enumerate(classes)}
    table = AnnotationTable(
        name=name,
        kind="voc",
        source=split_list(folder, split),
        categories=dict(enumerate(classes)),
        image_ids=list(stems),
        files=files,
        sizes=sizes,
        records=records,
        image_of=np.array(image_of, np.int64),
        category_of=np.array([numbers.get(name, -1) for name in names], np.int64),
        written=written,
        crowd=np.zeros(len(names), bool),
        difficult=np.array(difficult, bool),
        segmentations=[None] * len(names),
        unlisted={name: found[name] for name in sorted(found.keys() - numbers.keys())},
        problems=problems,
    )
    for index in np.flatnonzero(table.category_of < 0):
        if not names[index]:
            problems.append(table.problem("incomplete", index, "it has no name"))
            continue
        why = f"its name is {names[index]!r}; the classes are {', '.join(list(classes)[:20])}"
        kind = "class-left-out" if chosen else "category-unknown"
        problems.append(table.problem(kind, index, why))
    return table


def split_list(folder: str, split: str) -> str:
    """Return the path of a split's list of images."""
    return os.path.join(folder, "ImageSets", "Main", f"{split}.txt")


def split_ids(folder: str, split: str) -> list[str]:
    """Read the ids of a split's images, in the order of its list; none may be there twice."""
    names = _listed(folder, split)
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"{split_list(folder, split)}: {len(repeated)} images are listed more than once: "
            f"{', '.join(repeated[:_NAMED])}. List each once."
        )
    return names


def classes_in(folder: str) -> list[str]:
    """Find the class names of all splits: one of them may lack a class."""
    annotations = os.path.join(folder, "Annotations")
    names = set()
    for name in os.listdir(annotations):
        with contextlib.suppress(ET.ParseError, OSError):
            root = ET.parse(os.path.join(annotations, name)).getroot()
            names |= {(node.text or "").strip() for node in root.findall("object/name")}
    return sorted(names - {""})


def _listed(folder: str, split: str) -> list[str]:
    path = split_list(folder, split)
    lists = os.path.dirname(path)
    if not os.path.isdir(lists):
        raise InputError(
            f"{path}: expected a folder in Pascal VOC's layout (Annotations, ImageSets/Main, "
            "JPEGImages), and ImageSets/Main is not there. Check the folder; for detectron2's own "
            "data sets DETECTRON2_DATASETS."
        )
    if not os.path.isfile(path):
        present = sorted(name[:-4] for name in os.listdir(lists) if name.endswith(".txt"))
        raise InputError(
            f"{path}: expected the list of the split '{split}', found nothing there; there are "
            f"{', '.join(present[:20]) or 'none'}.{nearest(split, present)}"
        )
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: is empty; there is nothing to train or test on.")
    # The lists of one class (car_trainval.txt) say -1, 0 or 1 behind each id.
    marked = [name for name in names if name.split()[1:] in (["-1"], ["0"], ["1"])]
    if marked:
        raise InputError(
            f"{path}: {len(marked)} lines have a mark behind the image's id: "
            f"{'; '.join(marked[:_NAMED])}. Name the split alone, such as trainval, and not the "
            "list of a class."
        )
    return names


def _files(folder: str, stems: Sequence[str]) -> list[str]:
    """The image of each stem; .jpg where there is none, or one of that suffix too."""
    names = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    there = {os.path.splitext(name)[0]: name for name in names if not name.endswith(".jpg")}
    there.update((name[:-4], name) for name in names if name.endswith(".jpg"))
    return [os.path.join(folder, there.get(stem, f"{stem}.jpg")) for stem in stems]


def _side(root: ET.Element, side: str) -> float:
    found = _number(root, f"size/{side}")
    if found < 1:
        raise ValueError(f"size/{side} is {found:g}, expected pixels")
    return int(found)


def _corners(node: ET.Element) -> list[float]:
    """[x0, y0, x1, y1] in pixels from the image's corner, the right and lower side excluded."""
    x0, y0, x1, y1 = (_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    return [x0 - 1, y0 - 1, x1, y1]


def _number(node: ET.Element, path: str) -> float:
    text = node.findtext(path)
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path} is missing" if text is None else f"{path} is {text!r}")
    return number
