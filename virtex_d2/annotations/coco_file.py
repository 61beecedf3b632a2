"""COCO's detection format: a JSON file and a folder of images; LVIS's adds to it."""

import os
from typing import Any

import pycocotools.mask as mask_utils
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from virtex_d2.annotations.json_checks import check_file
from virtex_d2.annotations.records import read_sound
from virtex_d2.annotations.use import Found, Use


def check_coco_file(path: str, image_root: str, use: Use) -> Found:
    """Read a COCO-format detection file and check all that a run depends on.

    Args:
        path: the JSON file.
        image_root: the folder of its images.
        use: what the run does with it.
    """
    advice = "Check the folder, or remove them from the file."
    return check_file("coco", path, image_root, use, advice)[0]


def load_json_file(kind: str, path: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """A file of COCO's or LVIS's format as detectron2's records; sets the classes of `name`.

    detectron2's own loaders read the file's values as they are, and LVIS's knows the classes by the
    data set's name, and polygons alone.

    Returns:
        By image id, with polygons or compressed run-length masks; `category_id` is the place of the
        category among the file's ids.
    """
    content = read_sound(kind, path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    metadata = MetadataCatalog.get(name)
    for key, value in (
        ("thing_classes", [category["name"] for category in categories]),
        ("thing_dataset_id_to_contiguous_id", numbers),
    ):
        if metadata.get(key) is None:  # detectron2's own data sets know theirs
            metadata.set(**{key: value})
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    }
    for item in content.get("annotations", []):
        annotation = {
            "bbox": item["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": numbers[item["category_id"]],
            "iscrowd": item.get("iscrowd", 0),
        }
        if "segmentation" in item:
            annotation["segmentation"] = _compressed(item["segmentation"])
        if item.get("keypoints"):
            # from the pixel's number to its centre, as in detectron2; each third is a visibility
            annotation["keypoints"] = [
                value if place % 3 == 2 else value + 0.5
                for place, value in enumerate(item["keypoints"])
            ]
        records[item["image_id"]]["annotations"].append(annotation)
    return list(records.values())


def _compressed(mask: list | dict) -> list | dict:
    """Runs as a list become the bytes that detectron2's mapper decodes; others stay."""
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        return mask_utils.frPyObjects(mask, *mask["size"])
    return mask
