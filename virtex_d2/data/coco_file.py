"""COCO's detection format: a JSON file and a folder of images."""

from .json_checks import Layout, check_file
from .use import Found, Use

_LAYOUT = Layout(
    name="COCO",
    required={
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    },
    image_path=lambda image: image["file_name"],
    folder_advice="Check the folder, or remove them from the file.",
)


def check_coco_file(path: str, image_root: str, use: Use) -> Found:
    """Read a COCO-format detection file and check all that a run depends on.

    Args:
        path: the JSON file.
        image_root: the folder of its images.
        use: what the run does with it.

    Raises:
        InputError: with the file, the number of records that are wrong, and the first ten.
    """
    return check_file(path, image_root, use, _LAYOUT)[0]
