"""What a COCO-format detection file must be before a run depends on it."""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_json

logger = logging.getLogger(__name__)

NAMED = 10  # records that an error names

# What each record must have for the checks to speak of it.
_REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class CocoFile:
    """What a checked file holds.

    Attributes:
        path: of the file.
        categories: names by category id, in the order of the ids.
        num_images, num_annotations: how many it lists.
    """

    path: str
    categories: dict[int, str]
    num_images: int
    num_annotations: int


def check_coco_file(
    path: str,
    image_root: str,
    with_masks: bool,
    mask_format: str = "polygon",
    max_bad_box_share: float = 0.0,
) -> CocoFile:
    """Read a COCO-format detection file and check all that a run depends on.

    Args:
        path: the JSON file.
        image_root: the folder of its images.
        with_masks: whether every annotation needs a segmentation.
        mask_format: INPUT.MASK_FORMAT, "polygon" or "bitmask" (which takes polygons and RLE).
        max_bad_box_share: the fraction of annotations whose box may be empty or outside its image;
            they are named in a warning.

    Raises:
        InputError: with the file, the number of records that are wrong, and the first ten.
    """
    content = read_json(path)
    images, annotations, categories = (_records(content, key, path) for key in _REQUIRED)
    names = {category["id"]: category["name"] for category in categories}
    by_id = {image["id"]: image for image in images}
    if not images:
        raise InputError(f"{path}: `images` is empty; there is nothing to train or test on.")

    def refuse(what: str, items: list[str], advice: str) -> None:
        if items:
            raise InputError(f"{path}: {_counted(items, what)} {advice}")

    refuse(
        f"of its {len(images)} images are not in the folder {image_root}",
        _absent(image_root, [image["file_name"] for image in images]),
        "Check the folder, or remove them from the file.",
    )
    for key, records in (("images", images), ("annotations", annotations)):
        refuse(f"`{key}` have the id of another", _repeated(records), "Give each its own id.")
    refuse(
        f"annotations have a category_id that `categories` lacks (it has {_shortened(names)})",
        [
            f"annotation {item['id']} (category_id {item['category_id']})"
            for item in annotations
            if item["category_id"] not in names
        ],
        "Add the categories, or remove the annotations.",
    )
    refuse(
        "annotations have an image_id that `images` lacks",
        [
            f"annotation {item['id']} (image_id {item['image_id']})"
            for item in annotations
            if item["image_id"] not in by_id
        ],
        "The file is cut short, or made of two that do not belong together.",
    )
    bad_boxes = [
        problem for item in annotations if (problem := _box_problem(item, by_id[item["image_id"]]))
    ]
    what = "annotations have a box that is empty or outside its image"
    if len(bad_boxes) > max_bad_box_share * len(annotations):
        advice = "Boxes are [x, y, width, height] in pixels: correct or remove them, or allow a "
        refuse(what, bad_boxes, f"{advice}larger share with VIRTEX.MAX_BAD_BOX_SHARE.")
    elif bad_boxes:
        logger.warning("%s: %s They are clipped or left out.", path, _counted(bad_boxes, what))
    if with_masks:
        _check_masks(annotations, mask_format, refuse)
    return CocoFile(path, dict(sorted(names.items())), len(images), len(annotations))


def _check_masks(annotations: list[dict], mask_format: str, refuse) -> None:
    singles = [item for item in annotations if not item.get("iscrowd")]
    refuse(
        "annotations have no segmentation, which a mask head learns from",
        [f"annotation {item['id']}" for item in singles if not item.get("segmentation")],
        "Add them, or set MODEL.MASK_ON False.",
    )
    if mask_format == "polygon":
        refuse(
            "annotations have a run-length mask, but INPUT.MASK_FORMAT is polygon",
            [
                f"annotation {item['id']}"
                for item in singles
                if isinstance(item["segmentation"], dict)
            ],
            "Use INPUT.MASK_FORMAT bitmask.",
        )


def _box_problem(item: dict, image: dict) -> str:
    box = item["bbox"]
    problem = f"annotation {item['id']}: bbox {box}"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        return problem
    x, y, width, height = box
    # A pixel of rounding is common, in official files too.
    inside = -1 <= x and x + width <= image["width"] + 1
    inside = inside and -1 <= y and y + height <= image["height"] + 1
    if inside and width > 0 and height > 0:
        return ""
    size = f"{image['width']}x{image['height']}"
    return f"{problem} in the {size} image {image['file_name']}"


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _records(content: dict, key: str, path: str) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path}: expected a list of objects `{key}`, found the keys {sorted(content)[:10]}. "
            "Is it a COCO-format detection file?"
        )
    lacking = [
        f"{key}[{index}] lacks {', '.join(missing)}"
        for index, record in enumerate(records)
        if (missing := [name for name in _REQUIRED[key] if name not in record])
    ]
    if lacking:
        raise InputError(f"{path}: {_counted(lacking, f'records of `{key}` are incomplete')}")
    return records


def _absent(image_root: str, names: list[str]) -> list[str]:
    """One listing a folder, not one question an image: network file systems are slow to ask."""
    present: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, base = os.path.split(os.path.join(image_root, name))
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in present[folder]:
            absent.append(name)
    return absent


def _repeated(records: list[dict]) -> list[str]:
    seen: set = set()
    return list(_again(records, seen))


def _again(records: list[dict], seen: set) -> Iterator[str]:
    for record in records:
        if record["id"] in seen:
            yield f"id {record['id']}"
        seen.add(record["id"])


def _counted(items: list[str], what: str) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{len(items)} {what}: {'; '.join(items[:NAMED])}{more}."


def _shortened(names: dict[int, str]) -> str:
    return ", ".join(map(str, sorted(names)[:20])) + (", ..." if len(names) > 20 else "")
