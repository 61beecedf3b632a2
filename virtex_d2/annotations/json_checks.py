"""What a detection file in COCO's format, or LVIS's, must be before a run depends on it."""

from collections.abc import Hashable

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.problems import absent, box_fits, refuse, refuse_more_than
from virtex_d2.annotations.records import Records, read_records, shown
from virtex_d2.annotations.use import Found, Use
from virtex_d2.engine.errors import InputError


def check_file(
    kind: str, path: str, image_root: str, use: Use, folder_advice: str
) -> tuple[Found, Records]:
    """Read a file and check all that a run depends on, whatever its format adds.

    Args:
        kind: "coco" or "lvis".
        path: the JSON file.
        image_root: the folder of its images.
        use: what the run does with it.
        folder_advice: what to do where images are absent.

    Returns:
        What it holds, and its records.
    """
    content = read_records(kind, path)
    content.refuse_faults()
    images, annotations, categories = content.images, content.annotations, content.categories
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
        absent(image_root, [image["file_name"] for image in images]),
        f"of its {len(images)} images are not in the folder {image_root}",
        folder_advice,
    )
    names = {category["id"]: category["name"] for category in categories}
    by_id = {image["id"]: image for image in images}
    _check_references(path, annotations, names, by_id)
    _check_boxes(path, annotations, by_id, use)
    _check_masks(path, annotations, by_id, use)
    singles = sum(not item.get("iscrowd") for item in annotations)
    notes = () if content.has_truth else ("no annotations: predictions only, no AP",)
    found = Found(dict(sorted(names.items())), len(images), len(annotations), singles, notes)
    return found, content


def _check_references(path: str, annotations: list[dict], names: dict, by_id: dict) -> None:
    known = ", ".join(map(shown, sorted(names)[:20])) + (", ..." if len(names) > 20 else "")
    refuse(
        path,
        [
            f"annotation {item['id']} (category_id {shown(item['category_id'])})"
            for item in annotations
            if item["category_id"] not in names
        ],
        f"annotations have a category_id that `categories` lacks (it has {known})",
        "Add the categories, or remove the annotations.",
    )
    refuse(
        path,
        [
            f"annotation {item['id']} (image_id {shown(item['image_id'])})"
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
    x, y, width, height = box = item["bbox"]
    if box_fits(x, y, x + width, y + height, image["width"], image["height"]):
        return ""
    size = f"{image['width']}x{image['height']}"
    return f"annotation {item['id']}: bbox {box} in the {size} image {image['file_name']}"


def _check_masks(path: str, annotations: list[dict], by_id: dict, use: Use) -> None:
    sizes = {number: (image["height"], image["width"]) for number, image in by_id.items()}
    singles = [item for item in annotations if not item.get("iscrowd")]
    # A crowd is not learned from, but what is found inside it is not held against a detector.
    compared = annotations if use.tests else singles
    if use.masks:
        refuse(
            path,
            [f"annotation {item['id']}" for item in compared if "segmentation" not in item],
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
            if "segmentation" in item
            and (problem := mask_fault(item["segmentation"], sizes[item["image_id"]]))
        ],
        # Without a mask head, too: detectron2 drops the whole object with its box.
        "annotations have a segmentation that is no mask of their image",
        "Expected a list of polygons [x, y, x, y, ...] of three points or more, or a run-length "
        "mask {counts, size: [height, width]}: correct them, or for boxes alone leave the key out.",
    )


def _repeated(records: list[dict], field: str) -> list[str]:
    seen: set[Hashable] = set()
    again = []
    for record in records:
        if record[field] in seen:
            again.append(f"{field} {record[field]}")
        seen.add(record[field])
    return again
