"""What a detection file in COCO's format, or LVIS's, must be before a run depends on it."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_json

from .problems import (
    absent,
    box_fits,
    counted,
    is_number,
    is_size,
    refuse,
    refuse_more_than,
)
from .use import Found, Use

_LEAST_NUMBERS = 6  # of a polygon: three points


@dataclass(frozen=True)
class Layout:
    """How a format differs.

    Attributes:
        name: for people.
        required: key of the file -> what each of its records must have for the checks to speak of.
        image_path: an image's record -> its path below the image folder.
        folder_advice: what to do where images are absent.
    """

    name: str
    required: dict[str, tuple[str, ...]]
    image_path: Callable[[dict], str]
    folder_advice: str


def check_file(path: str, image_root: str, use: Use, layout: Layout) -> tuple[Found, dict]:
    """Read a file and check all that a run depends on, whatever its format adds.

    Returns:
        What it holds, and its content.

    Raises:
        InputError: with the file, the number of records that are wrong, and the first ten.
    """
    content = read_json(path)
    images, annotations, categories = (_records(content, key, path, layout) for key in _KEYS)
    if not images:
        raise InputError(f"{path}: `images` is empty; there is nothing to train or test on.")
    for key, records, field in (
        ("images", images, "id"),
        ("annotations", annotations, "id"),
        ("categories", categories, "id"),
        ("categories", categories, "name"),
    ):
        advice = f"Give each its own {field}."
        refuse(path, _repeated(records, field), f"`{key}` have the {field} of another", advice)
    refuse(
        path,
        absent(image_root, [layout.image_path(image) for image in images]),
        f"of its {len(images)} images are not in the folder {image_root}",
        layout.folder_advice,
    )
    refuse(
        path,
        [
            f"image {image['id']} (width {image['width']!r}, height {image['height']!r})"
            for image in images
            if not (is_size(image["width"]) and is_size(image["height"]))
        ],
        "images have a size that is not in pixels",
        "Write width and height as numbers above 0.",
    )
    names = {category["id"]: category["name"] for category in categories}
    by_id = {image["id"]: image for image in images}
    _check_references(path, annotations, names, by_id)
    _check_boxes(path, annotations, by_id, use)
    _check_masks(path, annotations, by_id, use)
    singles = sum(not item.get("iscrowd") for item in annotations)
    found = Found(dict(sorted(names.items())), len(images), len(annotations), singles)
    return found, content


_KEYS = ("images", "annotations", "categories")


def _records(content: dict, key: str, path: str, layout: Layout) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path}: expected a list of objects `{key}`, found the keys {sorted(content)[:10]}. "
            f"Is it a {layout.name}-format detection file?"
        )
    lacking = [
        f"{key}[{index}] lacks {', '.join(missing)}"
        for index, record in enumerate(records)
        if (missing := [name for name in layout.required[key] if name not in record])
    ]
    if lacking:
        raise InputError(f"{path}: {counted(lacking, f'records of `{key}` are incomplete')}")
    return records


def _check_references(path: str, annotations: list[dict], names: dict, by_id: dict) -> None:
    known = ", ".join(map(str, sorted(names)[:20])) + (", ..." if len(names) > 20 else "")
    refuse(
        path,
        [
            f"annotation {item['id']} (category_id {item['category_id']})"
            for item in annotations
            if item["category_id"] not in names
        ],
        f"annotations have a category_id that `categories` lacks (it has {known})",
        "Add the categories, or remove the annotations.",
    )
    refuse(
        path,
        [
            f"annotation {item['id']} (image_id {item['image_id']})"
            for item in annotations
            if item["image_id"] not in by_id
        ],
        "annotations have an image_id that `images` lacks",
        "The file is cut short, or made of two that do not belong together.",
    )
    refuse(
        path,
        [f"annotation {item['id']}" for item in annotations if item.get("ignore")],
        "annotations have `ignore` set, which detectron2 does not know",
        "Mark what should not count with iscrowd 1, or remove it.",
    )


def _check_boxes(path: str, annotations: list[dict], by_id: dict, use: Use) -> None:
    refuse_more_than(
        use.max_bad_share,
        len(annotations),
        path,
        [
            problem
            for item in annotations
            if (problem := _box_problem(item, by_id[item["image_id"]]))
        ],
        "annotations have a box that is empty or outside its image",
        "Boxes are [x, y, width, height] in pixels: correct or remove them.",
    )


def _box_problem(item: dict, image: dict) -> str:
    box = item["bbox"]
    problem = f"annotation {item['id']}: bbox {box}"
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        return problem
    x, y, width, height = box
    if box_fits(x, y, x + width, y + height, image["width"], image["height"]):
        return ""
    size = f"{image['width']}x{image['height']}"
    return f"{problem} in the {size} image {image.get('file_name', image['id'])}"


def _check_masks(path: str, annotations: list[dict], by_id: dict, use: Use) -> None:
    singles = [item for item in annotations if not item.get("iscrowd")]
    # A crowd is not learned from, but what is found inside it is not held against a detector.
    compared = annotations if use.tests else singles
    if use.masks:
        refuse(
            path,
            [f"annotation {item['id']}" for item in compared if not item.get("segmentation")],
            "annotations have no segmentation, which a mask head needs",
            "Add them, or set MODEL.MASK_ON False.",
        )
    if use.masks and use.trains and use.mask_format == "polygon":
        refuse(
            path,
            [
                f"annotation {item['id']}"
                for item in singles
                if isinstance(item["segmentation"], dict)
            ],
            "annotations have a run-length mask, but INPUT.MASK_FORMAT is polygon",
            "Use INPUT.MASK_FORMAT bitmask.",
        )
    refuse_more_than(
        use.max_bad_share,
        len(annotations),
        path,
        [
            f"annotation {item['id']}: {problem}"
            for item in annotations
            if item.get("segmentation")
            and (problem := _mask_problem(item["segmentation"], by_id[item["image_id"]]))
        ],
        # Without a mask head, too: detectron2 drops the whole object with its box.
        "annotations have a segmentation that is no mask of their image",
        "Expected a list of polygons [x, y, x, y, ...] of three points or more, or a run-length "
        "mask {counts, size: [height, width]}: correct them, or for boxes alone leave the key out.",
    )


def _mask_problem(mask: object, image: dict) -> str:
    if isinstance(mask, dict):
        return _rle_problem(mask, [image["height"], image["width"]])
    if not isinstance(mask, list) or not all(isinstance(part, list) for part in mask):
        return f"found a {type(mask).__name__} that is no list of polygons"
    for part in mask:
        if len(part) < _LEAST_NUMBERS or len(part) % 2 or not _are_numbers(part):
            shown = str(part[:8])[:-1] + (", ...]" if len(part) > 8 else "]")
            return f"a polygon of {len(part)} numbers {shown}"
    return ""


def _are_numbers(values: list) -> bool:
    """Whether all are finite numbers; by their sum, because COCO has some ten million of them."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def _rle_problem(mask: dict, size: list) -> str:
    counts = mask.get("counts")
    if mask.get("size") != size:
        return f"a run-length mask of size {mask.get('size')} in an image of {size}"
    if isinstance(counts, str):
        return ""
    if not isinstance(counts, list) or not all(isinstance(run, int) for run in counts):
        return "a run-length mask without counts"
    pixels = size[0] * size[1]
    return "" if sum(counts) == pixels else f"runs of {sum(counts)} pixels instead of {pixels}"


def _repeated(records: list[dict], field: str) -> list[str]:
    seen: set[Hashable] = set()
    again = []
    for record in records:
        if record[field] in seen:
            again.append(f"{field} {record[field]}")
        seen.add(record[field])
    return again
