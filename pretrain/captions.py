"""Annotation files -> records of an image and its captions; errors name the record."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from virtex_d2.runtime.errors import InputError, nearest
from virtex_d2.runtime.files import read_json


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One image and what people said of it.

    Attributes:
        image_id: as in the annotation file.
        file_name: absolute path of the image.
        captions: at least one, none of them blank.
    """

    image_id: int | str
    file_name: str
    captions: tuple[str, ...]


def load_coco_captions(
    json_path: str | os.PathLike, image_root: str | os.PathLike
) -> list[CaptionRecord]:
    """Read a COCO captions file: `images` (id, file_name) and `annotations` (image_id, caption).

    Args:
        json_path: the annotation file.
        image_root: the folder that `file_name` is relative to.

    Returns:
        Records in the order of `images`, captions in the order of `annotations`.

    Raises:
        InputError: the file is missing or not COCO captions; a caption has no text or no image; an
            image has no caption or is not on the disk. Whether images can be decoded is not
            checked here: it would take as long as an epoch.
    """
    content = read_json(json_path)
    images = _list(content, "images", json_path)
    annotations = _list(content, "annotations", json_path)

    _refuse(
        json_path,
        _elements("images", images, lambda image: not _is_image(image)),
        "images lack an `id` (a number or text) or a `file_name` (text)",
        "Remove them or fill them in.",
    )
    _refuse(
        json_path,
        _elements("annotations", annotations, lambda annotation: not _is_caption(annotation)),
        "annotations lack a text in `caption` or an `image_id`",
        "Remove them or fill them in.",
    )
    names: dict[int | str, str] = {}
    repeated = []
    for image in images:
        if image["id"] in names:
            repeated.append(f"{image['id']} of {names[image['id']]} and {image['file_name']}")
        names[image["id"]] = image["file_name"]
    _refuse(json_path, repeated, "image ids are given twice", "Give each image an id of its own.")

    captions: dict[int | str, list[str]] = defaultdict(list)
    for annotation in annotations:
        captions[annotation["image_id"]].append(annotation["caption"])
    _refuse(
        json_path,
        [str(image_id) for image_id in captions if image_id not in names],
        "image ids of `annotations` are not in `images`",
        "The file is cut short, or two files were mixed.",
    )
    _refuse(
        json_path,
        [f"{name} (id {image_id})" for image_id, name in names.items() if image_id not in captions],
        "images have no caption",
        "Remove them from `images`.",
    )
    root = os.path.abspath(image_root)
    records = [
        CaptionRecord(image_id, os.path.join(root, name), tuple(captions[image_id]))
        for image_id, name in names.items()
    ]
    if not records:
        raise InputError(f"{json_path}: it lists no images.")
    _refuse_absent(records, json_path, image_root)
    return records


# A reader for each annotation format: (annotation file, folder of images) -> records.
FORMATS: dict[str, Callable[[str, str], list[CaptionRecord]]] = {"coco": load_coco_captions}


def load_records(format_name: str, annotations: str, image_root: str) -> list[CaptionRecord]:
    """Read annotations of a named format.

    Raises:
        InputError: no such format, or what the format's reader raises.
    """
    if format_name not in FORMATS:
        raise InputError(
            f"DATA.FORMAT: {format_name!r} is not one of {', '.join(FORMATS)}."
            + nearest(format_name, FORMATS)
        )
    return FORMATS[format_name](annotations, image_root)


def _list(content: dict, name: str, path: str | os.PathLike) -> list:
    if not isinstance(content.get(name), list):
        raise InputError(
            f"{path}: expected a list `{name}`, found the keys {sorted(content)[:10]}. Is it a "
            "captions file?"
        )
    return content[name]


def _is_image(image: Any) -> bool:
    return (
        isinstance(image, dict)
        and isinstance(image.get("id"), int | str)
        and isinstance(image.get("file_name"), str)
        and image["file_name"] != ""
    )


def _is_caption(annotation: Any) -> bool:
    return (
        isinstance(annotation, dict)
        and isinstance(annotation.get("image_id"), int | str)
        and isinstance(annotation.get("caption"), str)
        and not annotation["caption"].isspace()
        and annotation["caption"] != ""
    )


def _elements(name: str, elements: list, is_wrong: Callable[[Any], bool]) -> list[str]:
    return [
        f"{name}[{index}] = {json.dumps(element)[:120]}"
        for index, element in enumerate(elements)
        if is_wrong(element)
    ]


def _refuse(json_path: str | os.PathLike, found: Iterable[str], what: str, what_to_do: str) -> None:
    """Raise where anything was found; the message counts all of it and names the first ten."""
    if found := list(found):
        first = ", ".join(found[:10])
        raise InputError(f"{json_path}: {len(found)} {what}; the first: {first}. {what_to_do}")


def _refuse_absent(
    records: list[CaptionRecord], json_path: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """One listing a folder, not one question an image: network file systems are slow to ask."""
    if not os.path.isdir(image_root):
        raise InputError(
            f"'{image_root}': expected the folder of the images of {json_path}, found none there."
        )
    present: dict[str, set[str]] = {}
    absent = []
    for record in records:
        folder, name = os.path.split(record.file_name)
        if folder not in present:
            present[folder] = _names_in(folder)
        if name not in present[folder]:
            absent.append(record.file_name)
    _refuse(
        json_path,
        absent,
        f"of its {len(records)} images are not on the disk",
        "Check the folder of images, or remove them from the file.",
    )


def _names_in(folder: str) -> set[str]:
    """Names in a folder; none where there is no such folder.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error.strerror}.") from error
