"""Read COCO's and LVIS's annotation files, typed: for checks, training and evaluation.

What JSON can say in several ways without loss becomes one: 96.0 is 96, and null is as if the key
were not there. Any other value of a wrong type is a `Fault` with its record. Keys that nothing here
reads stay as they are.
"""

import contextlib
import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.table import is_box, is_number
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json

_WRONG, _ABSENT = object(), object()
_LARGEST_SIDE = 2**24  # pixels; beyond, pycocotools' arithmetic does not end well
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A field that is missing or of a wrong type."""

    part: str  # "images", "annotations" or "categories"
    field: str  # its key
    record: str  # which, for people: "annotation 17", or by its place: "annotations[3]"
    why: str  # what was found, and what was expected
    item: dict[str, Any]  # the record, without the field


@dataclass(frozen=True)
class Records:
    """The records of a file, normalised."""

    # images, annotations, categories: those that have what makes them one (`_ESSENTIAL`), with
    # `file_name` the path below the image folder. A field with a fault is not in them
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    has_truth: bool  # whether the file has `annotations` at all; those for a test server have none
    rest: dict[str, Any]  # the file's other keys
    faults: list[Fault]  # in the order of the file


def shown(value: Any) -> str:
    """Format a value of a JSON file for messages: texts in quotes, so that "1" is not 1."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_records(kind: str, path: str) -> Records:
    """Read a detection file.

    Args:
        kind: "coco" or "lvis". LVIS's images lie where the last two parts of their `coco_url` say
            (train2017/000000155379.jpg), as in detectron2: its splits are not COCO's, and v0.5's
            `file_name` is of COCO 2014. Without it, and in COCO's files, `file_name` says it.
    """
    with no_collection():
        content = read_json(path)
        has_truth = content.get("annotations") is not None
        faults: list[Fault] = []
        parts = {}
        for part in _FIELDS:
            records = content.get(part) if has_truth or part != "annotations" else []
            others = [r for r in records if type(r) is not dict] if type(records) is list else [0]
            if others:
                found = f"the keys {sorted(content)[:10]}"
                if records:
                    found = f"{shown(others[0] if type(records) is list else records)} in it"
                raise InputError(
                    f"{path}: expected a list of objects `{part}`, found {found}. Is it a "
                    f"{kind.upper()}-format detection file?"
                )
            parts[part] = _normalised(kind, part, records, faults)
    if kind == "lvis":
        faults += _foreign_ids(parts["images"], parts["categories"])
    rest = {key: value for key, value in content.items() if key not in _FIELDS}
    return Records(**parts, has_truth=has_truth, rest=rest, faults=faults)


def read_sound(kind: str, path: str) -> dict[str, Any]:
    """Read a file that has passed its check, for pycocotools and lvis.

    Returns:
        The file's content, normalised; without the objects whose mask is none (of which the check
        allows a share), and without `annotations` where the file has none.
    """
    records = read_records(kind, path)
    for fault in records.faults:
        raise InputError(f"{path}: {fault.record} {fault.why}. Was it changed after its check?")
    content = {**records.rest, "images": records.images, "categories": records.categories}
    if records.has_truth:
        sizes = {image["id"]: (image["height"], image["width"]) for image in records.images}
        content["annotations"] = [
            item
            for item in records.annotations
            if "segmentation" not in item
            or not mask_fault(item["segmentation"], sizes[item["image_id"]])
        ]
    return content


def _normalised(kind: str, part: str, records: list[dict], faults: list[Fault]) -> list[dict]:
    required, essential, fields = _REQUIRED[part], _ESSENTIAL[part], list(_FIELDS[part].items())
    kept = []
    for index, record in enumerate(records):
        place = f"{part}[{index}]"
        if kind == "lvis" and type(record.get("coco_url")) is str:
            record["file_name"] = "/".join(record["coco_url"].split("/")[-2:])
        if not required <= record.keys():
            missing = [field for field in _FIELDS[part] if field in required - record.keys()]
            faults.append(Fault(part, missing[0], place, f"lacks {', '.join(missing)}", record))
        for field, (read, expected) in fields:
            value = record.get(field, _ABSENT)
            if value is _ABSENT:
                continue
            normal = _WRONG if value is None else read(value)
            if normal is value:
                continue
            if normal is not _WRONG:
                record[field] = normal
                continue
            del record[field]
            if (value is None and field not in required) or (field == "segmentation" and not value):
                continue
            by_id = field not in essential and "id" in record
            name = f"{_SINGULAR[part]} {record['id']}" if by_id else place
            why = f"has {field} {shown(value)}, expected {expected}"
            faults.append(Fault(part, field, name, why, record))
        if essential <= record.keys():
            kept.append(record)
    types = Counter(type(record["id"]) for record in kept)
    if len(types) > 1:
        (common, _), *_ = types.most_common(1)
        for index, record in enumerate(records):
            if type(record.get("id", common())) is not common:
                why = f"has id {shown(record['id'])}, but most others are {_KINDS[common]}"
                faults.append(Fault(part, "id", f"{part}[{index}]", why, record))
    return kept


def _foreign_ids(images: list[dict], categories: list[dict]) -> Iterator[Fault]:
    """LVIS's lists of ids that are numbers where the categories' are texts, or the reverse."""
    kinds = {type(category["id"]) for category in categories}
    for image in images:
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            values = image.get(field, [])
            if not set(map(type, values)) <= kinds:
                other = next(value for value in values if type(value) not in kinds)
                why = f"has {shown(other)} in {field}, expected ids as those of `categories`"
                yield Fault("images", field, f"image {image['id']}", why, image)


def _whole(value: Any) -> Any:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else _WRONG


def _id(value: Any) -> Any:
    if type(value) is int and -(2**63) < value < 2**63:  # the usual: a file has millions of them
        return value
    return value if type(value) is str else _whole(value)


def _ids(values: Any) -> Any:
    normal = [_id(value) for value in values] if type(values) is list else [_WRONG]
    return _WRONG if _WRONG in normal else normal


def _text(value: Any) -> Any:
    return value if type(value) is str else _WRONG


def _side(value: Any) -> Any:
    value = _whole(value)
    return value if value is not _WRONG and 0 < value <= _LARGEST_SIDE else _WRONG


def _flag(value: Any) -> Any:
    value = _whole(value)
    return value if value in (0, 1) else _WRONG


def _area(value: Any) -> Any:
    return value if is_number(value) and 0 <= value < math.inf else _WRONG


def _box(value: Any) -> Any:
    usual = type(value) is list and len(value) == 4 and set(map(type, value)) == {float}
    return value if (usual or is_box(value)) and math.isfinite(sum(value)) else _WRONG


def _ignore(value: Any) -> Any:
    return value if value else 0


def _keypoints(values: Any) -> Any:
    sound = type(values) is list and len(values) % 3 == 0 and all(map(is_number, values))
    return values if sound and math.isfinite(sum(values)) else _WRONG


def _mask(mask: Any) -> Any:
    """Run lengths as whole numbers; what is wrong with a mask is told by `mask_fault`."""
    if not mask and type(mask) in (list, dict):
        return _WRONG
    if type(mask) is dict:
        whole = {
            key: [value if (w := _whole(value)) is _WRONG else w for value in values]
            for key in ("size", "counts")
            if type(values := mask.get(key)) is list and float in set(map(type, values))
        }
        return {**mask, **whole} if whole else mask
    return mask


_KINDS = {int: "numbers", str: "texts"}
_ID = (_id, "a whole number (or a text, as all others)")
_SIDE = (_side, "pixels, a whole number above 0")
# What is read of each record -> (reader, what it expects).
_FIELDS: dict[str, dict[str, tuple[Callable[[Any], Any], str]]] = {
    "images": {
        "id": _ID,
        "file_name": (_text, "a text"),
        "height": _SIDE,
        "width": _SIDE,
        "coco_url": (_text, "a text"),
        "neg_category_ids": (_ids, "a list of category ids"),
        "not_exhaustive_category_ids": (_ids, "a list of category ids"),
    },
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (_box, "[x, y, width, height] in pixels"),
        "iscrowd": (_flag, "0 or 1"),
        "area": (_area, "a number of pixels"),
        "ignore": (_ignore, "0"),
        "segmentation": (_mask, "a mask"),
        "keypoints": (_keypoints, "a list of numbers, three for each point"),
    },
    "categories": {"id": _ID, "name": (_text, "a text")},
}
_REQUIRED = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}
# Without these a record cannot be spoken of.
_ESSENTIAL = {
    "images": {"id"},
    "annotations": {"id", "image_id", "category_id"},
    "categories": {"id", "name"},
}


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector: it goes through all records again and again as they come."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
