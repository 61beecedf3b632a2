"""Annotation files of COCO and LVIS, read record by record without stopping at a broken one."""

import contextlib
import gc
import os
from collections.abc import Hashable, Iterable, Iterator

import numpy as np

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_json

from .table import AnnotationTable, Problem, is_number, number_boxes

# What a record must have to be spoken of; without the others it is only incomplete.
_KEYS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_ESSENTIAL = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id", "name"),
}


def read_json_file(kind: str, path: str, image_root: str, name: str) -> AnnotationTable:
    """Read a COCO or LVIS detection file.

    Images of LVIS lie in the subfolder of `image_root` that the end of their `coco_url` names
    ("val2017/000000000139.jpg"), as in detectron2.

    Args:
        kind: "coco" or "lvis".
        path: the JSON file.
        image_root: the folder of the images.
        name: of the data set.

    Raises:
        InputError: it cannot be read, or is no detection file at all.
    """
    with _no_collection():
        return _read(kind, path, image_root, name)


def _read(kind: str, path: str, image_root: str, name: str) -> AnnotationTable:
    content = read_json(path)
    problems: list[Problem] = []
    images, annotations, categories = (_records(content, part, path, problems) for part in _KEYS)
    files, sizes = _files_and_sizes(kind, images, image_root, problems)
    names = {category["id"]: category["name"] for category in reversed(categories)}
    names = {category["id"]: names[category["id"]] for category in categories}
    image_ids = [image["id"] for image in images]
    table = AnnotationTable(
        name=name,
        kind=kind,
        source=path,
        categories=names,
        image_ids=image_ids,
        files=files,
        sizes=sizes,
        records=[f"annotation {item['id']}" for item in annotations],
        image_of=_positions([item["image_id"] for item in annotations], image_ids),
        category_of=_positions([item["category_id"] for item in annotations], names),
        boxes=number_boxes([item.get("bbox") for item in annotations]),
        crowd=np.array([item.get("iscrowd") == 1 for item in annotations], bool),
        difficult=np.zeros(len(annotations), bool),
        segmentations=[item.get("segmentation") for item in annotations],
        problems=problems,
    )
    problems += _unknown(table, annotations)
    for field in ("area", "iscrowd") if kind == "coco" else ("area",):
        lacking = [index for index, item in enumerate(annotations) if field not in item]
        problems += [table.problem("field-assumed", index, f"no {field}") for index in lacking]
    for part, records in (("image", images), ("annotation", annotations), ("category", categories)):
        problems += _repeated_ids(part, records)
    problems += _repeated_names(categories)
    if kind == "lvis":
        _read_verified(table, images)
    return table


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector: it goes through all records again and again as they come."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _records(content: dict, part: str, path: str, problems: list[Problem]) -> list[dict]:
    records, essential = content.get(part), _ESSENTIAL[part]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path}: expected a list of objects `{part}`, found the keys {sorted(content)[:10]}. "
            "Is it a detection file in COCO's or LVIS's format?"
        )
    # Almost all are whole: a look at the keys of each, and at what types there are at all.
    required = set(_KEYS[part])
    typical = all(
        {type(record.get(key)) for record in records} <= ({str} if key == "name" else {int, str})
        for key in essential
    )
    odd = {
        index
        for index, record in enumerate(records)
        if not required <= record.keys() or not (typical or _is_usable(record, essential))
    }
    for index in sorted(odd):
        record = records[index]
        missing = ", ".join(sorted(required - record.keys()))
        why = [f"lacks {missing}"] if missing else []
        why += [
            f"{key} is {record[key]!r}, no {'text' if key == 'name' else 'number and no text'}"
            for key in essential
            if key in record and not _is_usable(record, [key])
        ]
        file = record.get("file_name")
        where = file if part == "images" and isinstance(file, str) else ""
        problems.append(Problem("incomplete", f"{part}[{index}]", where, "; ".join(why)))
    return [
        record
        for index, record in enumerate(records)
        if index not in odd or _is_usable(record, essential)
    ]


def _is_usable(record: dict, essential: Iterable[str]) -> bool:
    return all(
        isinstance(value := record.get(key), str) or (key != "name" and is_number(value))
        for key in essential
    )


def _files_and_sizes(
    kind: str, images: list[dict], image_root: str, problems: list[Problem]
) -> tuple[list[str], np.ndarray]:
    files, sizes = [], np.full((len(images), 2), np.nan)
    for index, image in enumerate(images):
        file = image.get("file_name")
        if kind == "lvis" and isinstance(image.get("coco_url"), str):
            file = os.path.join(*image["coco_url"].split("/")[-2:])
        record = f"image {image['id']}"
        if not isinstance(file, str) or not file:
            problems.append(Problem("incomplete", record, "", f"its file_name is {file!r}"))
            file = ""
        files.append(os.path.join(image_root or ".", file) if file else "")
        size = [image.get("width"), image.get("height")]
        if all(is_number(side) and 0 < side < np.inf for side in size):
            sizes[index] = size
        elif "width" in image and "height" in image:
            why = f"width and height are {size[0]!r} and {size[1]!r}"
            problems.append(Problem("incomplete", record, files[-1], why))
    return files, sizes


def _positions(ids: list[Hashable], known: Iterable[Hashable]) -> np.ndarray:
    first: dict[Hashable, int] = {}
    for position, key in enumerate(known):
        first.setdefault(key, position)
    return np.array([first.get(key, -1) for key in ids], np.int64)


def _unknown(table: AnnotationTable, annotations: list[dict]) -> Iterable[Problem]:
    for index in np.flatnonzero(table.image_of < 0):
        why = f"image_id {annotations[index]['image_id']!r} is not in `images`"
        yield table.problem("image-unknown", index, why)
    for index in np.flatnonzero(table.category_of < 0):
        why = f"category_id {annotations[index]['category_id']!r} is not in `categories`"
        yield table.problem("category-unknown", index, why)
    for index, item in enumerate(annotations):
        if item.get("iscrowd", 0) not in (0, 1):
            why = f"iscrowd is {item['iscrowd']!r}, expected 0 or 1"
            yield table.problem("incomplete", index, why)


def _repeated_ids(part: str, records: list[dict]) -> Iterable[Problem]:
    seen: set[Hashable] = set()
    for record in records:
        if record["id"] in seen:
            file = record.get("file_name")
            where = file if isinstance(file, str) else ""
            yield Problem("id-repeated", f"{part} {record['id']}", where, "an earlier one has it")
        seen.add(record["id"])


def _repeated_names(categories: list[dict]) -> Iterable[Problem]:
    first: dict[str, Hashable] = {}
    for category in categories:
        other = first.setdefault(category["name"], category["id"])
        if other != category["id"]:
            why = f"the name {category['name']!r} is also that of category {other}"
            yield Problem("category-repeated", f"category {category['id']}", "", why)


def _read_verified(table: AnnotationTable, images: list[dict]) -> None:
    """LVIS: which categories each image was searched for, and where that contradicts the objects.

    A category is verified as present by its objects or as absent by neg_category_ids; where it is
    in not_exhaustive_category_ids, not all objects are annotated (arXiv 1908.03195, section 3).
    """
    ids = list(table.categories)
    present: list[set] = [set() for _ in images]
    for image, category in zip(table.image_of.tolist(), table.category_of.tolist()):
        if image >= 0 and category >= 0:
            present[image].add(ids[category])
    for index, image in enumerate(images):
        record, lists = f"image {image['id']}", {}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            values = image.get(key, [])
            if key not in image:
                problem = Problem("field-assumed", record, table.files[index], f"no {key}")
                table.problems.append(problem)
            elif not isinstance(values, list) or not all(map(is_number, values)):
                why = f"{key} is {values!r}, expected a list of category ids"
                table.problems.append(Problem("incomplete", record, table.files[index], why))
                values = []
            lists[key] = set(values)
            if unknown := sorted(lists[key] - table.categories.keys()):
                why = f"{key} has {unknown[:5]}, which `categories` lacks"
                problem = Problem("category-unknown", record, table.files[index], why)
                table.problems.append(problem)
        negative, partial = lists.values()
        for category in sorted(negative & present[index], key=str):
            why = (
                f"{table.categories[category]!r} is among neg_category_ids and annotated, "
                "so that it is both absent and present"
            )
            table.problems.append(Problem("contradiction", record, table.files[index], why))
        table.verified[index] = frozenset((present[index] | negative) - partial)
