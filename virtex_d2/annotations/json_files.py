"""Annotation files of COCO and LVIS, read record by record without stopping at a broken one."""

import os
from collections.abc import Hashable, Iterable

import numpy as np

from virtex_d2.annotations.records import Records, read_records, shown
from virtex_d2.annotations.table import AnnotationTable, Problem, number_boxes


def read_json_file(kind: str, path: str, image_root: str, name: str) -> AnnotationTable:
    """Read a COCO or LVIS detection file.

    Images of LVIS lie in the subfolder of `image_root` that the end of their `coco_url` names
    ("val2017/000000000139.jpg"), as in detectron2.

    Args:
        kind: "coco" or "lvis".
        path: the JSON file.
        image_root: the folder of the images.
        name: of the data set.
    """
    records = read_records(kind, path)
    images, annotations, categories = records.images, records.annotations, records.categories
    problems: list[Problem] = []
    files = [
        os.path.join(image_root or ".", file) if (file := image.get("file_name")) else ""
        for image in images
    ]
    sizes = np.array([[i.get("width", np.nan), i.get("height", np.nan)] for i in images], float)
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
        sizes=sizes.reshape(-1, 2),
        records=[f"annotation {item['id']}" for item in annotations],
        image_of=_positions([item["image_id"] for item in annotations], image_ids),
        category_of=_positions([item["category_id"] for item in annotations], names),
        boxes=number_boxes([item.get("bbox") for item in annotations]),
        crowd=np.array([item.get("iscrowd") == 1 for item in annotations], bool),
        difficult=np.zeros(len(annotations), bool),
        segmentations=[item.get("segmentation") for item in annotations],
        problems=problems,
    )
    problems += _faults(records, dict(zip(image_ids, files)))
    told = {(id(fault.item), fault.field) for fault in records.faults}
    problems += _unknown(table, annotations)
    for field in ("area", "iscrowd") if kind == "coco" else ("area",):
        lacking = [
            index
            for index, item in enumerate(annotations)
            if field not in item and (id(item), field) not in told
        ]
        problems += [table.problem("field-assumed", index, f"no {field}") for index in lacking]
    for part, items in (("image", images), ("annotation", annotations), ("category", categories)):
        problems += _repeated_ids(part, items)
    problems += _repeated_names(categories)
    if kind == "lvis":
        _read_verified(table, images, told)
    return table


def _faults(records: Records, file_of: dict[Hashable, str]) -> Iterable[Problem]:
    if not records.has_truth:
        why = "the file has no `annotations`: it is to predict on, and has no AP"
        yield Problem("field-assumed", "annotations", "", why)
    for fault in records.faults:
        if fault.field == "bbox" and not fault.why.startswith("lacks"):
            continue  # told with the other boxes
        item = fault.item
        file = file_of.get(item.get("image_id" if fault.part == "annotations" else "id"), "")
        yield Problem(
            "incomplete", fault.record, "" if fault.part == "categories" else file, fault.why
        )


def _positions(ids: list[Hashable], known: Iterable[Hashable]) -> np.ndarray:
    first: dict[Hashable, int] = {}
    for position, key in enumerate(known):
        first.setdefault(key, position)
    return np.array([first.get(key, -1) for key in ids], np.int64)


def _unknown(table: AnnotationTable, annotations: list[dict]) -> Iterable[Problem]:
    for index in np.flatnonzero(table.image_of < 0):
        why = f"image_id {shown(annotations[index]['image_id'])} is not in `images`"
        yield table.problem("image-unknown", index, why)
    for index in np.flatnonzero(table.category_of < 0):
        why = f"category_id {shown(annotations[index]['category_id'])} is not in `categories`"
        yield table.problem("category-unknown", index, why)


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


def _read_verified(table: AnnotationTable, images: list[dict], told: set[tuple[int, str]]) -> None:
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
            if key not in image and (id(image), key) not in told:
                problem = Problem("field-assumed", record, table.files[index], f"no {key}")
                table.problems.append(problem)
            lists[key] = set(values)
            if unknown := sorted(lists[key] - table.categories.keys(), key=str):
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
