"""LVIS's detection format, v0.5 and v1, and any file of that format (arXiv 1908.03195).

What it adds to COCO's: an image names the categories that were looked for and not found, and those
of which not every object is annotated; a category says how frequent it is in the training images.
Nothing is known of the other categories in an image, and a detector is not judged by them there.
"""

from dataclasses import replace

from detectron2.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES as V0_5
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES as V1

from virtex_d2.annotations.json_checks import check_file
from virtex_d2.annotations.problems import refuse
from virtex_d2.annotations.records import Records, shown
from virtex_d2.annotations.use import Found, Use
from virtex_d2.engine.errors import InputError

# The versions have other classes, and the same number means another thing in each.
VERSIONS = {
    version: {category["id"]: category["name"] for category in table}
    for version, table in (("v0.5", V0_5), ("v1", V1))
}
FREQUENCIES = ("r", "c", "f")  # in up to 10, up to 100, more training images


def check_lvis_file(path: str, image_root: str, use: Use) -> Found:
    """Read an LVIS-format file and check all that a run depends on."""
    advice = (
        "Give the folder above those that `coco_url` ends with (train2017/..., val2017/...), or "
        "the folder of `file_name` where there is no `coco_url`."
    )
    found, records = check_file("lvis", path, image_root, use, advice)
    if use.tests and records.has_truth:
        _check_evaluation(path, records)
    version = lvis_version(found.categories)
    note = f"LVIS {version}" if version else "categories of its own"
    return replace(found, notes=(note, *found.notes))


def lvis_version(categories: dict[int, str]) -> str:
    """ "v0.5", "v1", or "" for other categories; `categories` are names by id."""
    return next((version for version, table in VERSIONS.items() if table == categories), "")


def check_version(name: str, path: str, categories: dict[int, str]) -> None:
    """Raise InputError if detectron2's data set of this name is of one version, and the file of
    another.
    """
    expected = next((version for version in VERSIONS if f"_{version}_" in name), "")
    found = lvis_version(categories)
    if not expected or "cocofied" in name or found == expected:
        return
    what = f"LVIS {found}" if found else f"{len(categories)} categories of another list"
    raise InputError(
        f"{path}: '{name}' is LVIS {expected} ({len(VERSIONS[expected])} categories), but the file "
        f"holds {what}. Its classes would mean something else: put the right file there, or name "
        "the file with VIRTEX.DATASETS."
    )


def without_version(name: str) -> str:
    """What is wrong with a name of LVIS that lacks its version; "" for other names."""
    if "lvis" not in name.lower() or any(version in name for version in VERSIONS):
        return ""
    return (
        " LVIS has two versions, with other classes: say which, as in lvis_v1_train and "
        "lvis_v1_val (1203 classes), or lvis_v0.5_train and lvis_v0.5_val (1230)."
    )


def _check_evaluation(path: str, content: Records) -> None:
    keys = ("neg_category_ids", "not_exhaustive_category_ids")
    refuse(
        path,
        [
            f"image {image['id']} lacks {', '.join(missing)}"
            for image in content.images
            if (missing := [key for key in keys if key not in image])
        ],
        "images do not say what is known of them, which LVIS's evaluation needs",
        "Add the lists of category ids, [] where there are none, or use the type coco.",
    )
    refuse(
        path,
        [
            f"category {category['id']} ({category['name']}): {shown(category.get('frequency'))}"
            for category in content.categories
            if category.get("frequency") not in FREQUENCIES
        ],
        "categories have no frequency of 'r', 'c' and 'f', for APr, APc and APf",
        "Give each one by the number of its training images: up to 10, up to 100, or more.",
    )
