"""COCO's and LVIS's detection format: a JSON file and a folder of images."""

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np

from virtex_d2.annotations.records import Records, no_collection, read_records, shown
from virtex_d2.annotations.table import AnnotationTable, Problem
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json

FREQUENCIES = ("r", "c", "f")  # of LVIS's classes: in up to 10, up to 100, more training images
# What LVIS says of an image: categories that are not there, and those not annotated throughout.
_VERIFIED = ("neg_category_ids", "not_exhaustive_category_ids")


@no_collection()
def read_json_file(kind: str, path: str, image_root: str, name: str) -> AnnotationTable:
    """Read a COCO or LVIS detection file.

    Args:
        kind: "coco" or "lvis". LVIS's images lie in the subfolder of `image_root` that the end of
            their `coco_url` names ("val2017/000000000139.jpg"), as in detectron2.
    """
    records = read_records(kind, path)
    images, annotations = records.images, records.annotations
    names: dict[Hashable, str] = {}
    for category in records.categories:
        names.setdefault(category["id"], category["name"])
    image_ids = [image["id"] for image in images]
    sizes = [[image.get(side, np.nan) for side in ("width", "height")] for image in images]
    table = AnnotationTable(
        name=name,
        kind=kind,
        source=path,
        categories=names,
        image_ids=image_ids,
        files=[
            os.path.join(image_root or ".", image["file_name"]) if "file_name" in image else ""
            for image in images
        ],
        sizes=np.array(sizes, float).reshape(-1, 2),
        records=[f"annotation {item['id']}" for item in annotations],
        image_of=_places((item["image_id"] for item in annotations), image_ids),
        category_of=_places((item["category_id"] for item in annotations), names),
        written=[item.get("bbox") for item in annotations],
        crowd=np.array([item.get("iscrowd") == 1 for item in annotations], bool),
        difficult=np.zeros(len(annotations), bool),
        segmentations=[item.get("segmentation") for item in annotations],
        keypoints=[item.get("keypoints") for item in annotations],
        has_truth=records.has_truth,
    )
    table.problems.extend(_problems(table, records))
    return table


def read_image_list(path: str, image_root: str, name: str) -> AnnotationTable:
    """Read the images of a file in COCO's format, whatever it says of them, such as captions.

    The table has no objects.
    """
    images = read_json(path).get("images")
    if not isinstance(images, list) or not images:
        raise InputError(f"{path}: expected a list `images`, as in COCO's caption files.")
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise InputError(
                f"{path}: `images`[{place}] has no text `file_name`: {shown(image)}. Is it a file "
                "in COCO's format?"
            )
    return AnnotationTable(
        name=name,
        kind="coco",
        source=path,
        categories={},
        image_ids=[image.get("id", place) for place, image in enumerate(images)],
        files=[os.path.join(image_root or ".", image["file_name"]) for image in images],
        sizes=np.full((len(images), 2), np.nan),
        records=[],
        image_of=np.zeros(0, int),
        category_of=np.zeros(0, int),
        written=[],
        crowd=np.zeros(0, bool),
        difficult=np.zeros(0, bool),
        segmentations=[],
        has_truth=False,
    )


def _places(ids: Iterable[Hashable], known: Iterable[Hashable]) -> np.ndarray:
    """Indices of ids among the known ones, of which the first counts; -1 for others."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(known):
        first.setdefault(key, place)
    return np.array([first.get(key, -1) for key in ids], np.int64)


def _problems(table: AnnotationTable, records: Records) -> Iterator[Problem]:
    if not table.has_truth:
        why = "the file has no `annotations`: it is to predict on, and has no AP"
        yield Problem("field-assumed", "annotations", "", why)
    file_of = dict(zip(table.image_ids, table.files))
    for fault in records.faults:
        kind = "incomplete"
        if fault.field == "bbox" and fault.why.startswith("has"):
            kind = "box-malformed"
        key = {"images": "id", "annotations": "image_id"}.get(fault.part)
        yield Problem(kind, fault.record, file_of.get(fault.item.get(key), ""), fault.why)
    for row in np.flatnonzero(table.image_of < 0):
        why = f"image_id {shown(records.annotations[row]['image_id'])} is not in `images`"
        yield table.problem("image-unknown", row, why)
    for row in np.flatnonzero(table.category_of < 0):
        why = f"category_id {shown(records.annotations[row]['category_id'])} is not in `categories`"
        yield table.problem("category-unknown", row, why)
    told = {(id(fault.item), fault.field) for fault in records.faults}
    for field in ("area", "iscrowd")[: 2 if table.kind == "coco" else 1]:
        table.assumed[field] = [
            row
            for row, item in enumerate(records.annotations)
            if field not in item and (id(item), field) not in told
        ]
    for row, item in enumerate(records.annotations):
        if item.get("ignore"):
            yield table.problem("ignore-set", row, f"it has ignore {shown(item['ignore'])}")
    yield from _repeated("image", records.images, table.files)
    yield from _repeated("annotation", records.annotations)
    yield from _repeated("category", records.categories)
    first: dict[str, Hashable] = {}
    for category in records.categories:
        other = first.setdefault(category["name"], category["id"])
        if other != category["id"]:
            why = f"the name {category['name']!r} is also that of category {other}"
            yield Problem("category-repeated", f"category {category['id']}", "", why)
    if table.kind == "lvis":
        yield from _read_verified(table, records, told)


def _repeated(part: str, records: list[dict], files: Sequence[str] = ()) -> Iterator[Problem]:
    seen: set[Hashable] = set()
    for record, file in zip_longest(records, files, fillvalue=""):
        if record["id"] in seen:
            yield Problem("id-repeated", f"{part} {record['id']}", file, "an earlier one has it")
        seen.add(record["id"])


def _read_verified(
    table: AnnotationTable, records: Records, told: set[tuple[int, str]]
) -> Iterator[Problem]:
    """Fill `table.verified`; yield what is missing, or contradicts the objects.

    A category is verified as present by its objects or as absent by neg_category_ids; where it is
    in not_exhaustive_category_ids, not all objects are annotated (arXiv 1908.03195, section 3).
    """
    ids = list(table.categories)
    present: list[set] = [set() for _ in records.images]
    for image, category in zip(table.image_of.tolist(), table.category_of.tolist()):
        if image >= 0 and category >= 0:
            present[image].add(ids[category])
    for index, image in enumerate(records.images):
        missing = [key for key in _VERIFIED if key not in image and (id(image), key) not in told]
        if missing and table.has_truth:
            yield table.image_problem("not-evaluable", index, f"lacks {', '.join(missing)}")
        negative, partial = (set(image.get(key, [])) for key in _VERIFIED)
        for key, values in zip(_VERIFIED, (negative, partial)):
            if unknown := sorted(values - table.categories.keys(), key=str):
                why = f"{key} has {unknown[:5]}, which `categories` lacks"
                yield table.image_problem("verified-unknown", index, why)
        for category in sorted(negative & present[index], key=str):
            why = (
                f"{table.categories[category]!r} is among neg_category_ids and annotated, "
                "so that it is both absent and present"
            )
            yield table.image_problem("contradiction", index, why)
        table.verified[index] = frozenset((present[index] | negative) - partial)
    for category in records.categories if table.has_truth else ():
        if category.get("frequency") not in FREQUENCIES:
            record = f"category {category['id']} ({category['name']})"
            why = f"has frequency {shown(category.get('frequency'))}, expected r, c or f"
            yield Problem("not-evaluable", record, "", why)
