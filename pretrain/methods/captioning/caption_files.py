"""Predicted and reference captions from files, matched image by image."""

import json
import os
from typing import Any

from pretrain.data.checks import plain_name
from pretrain.data.coco import as_id, of_another_type
from pretrain.methods.captioning.metrics import Captions
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json, read_text


def read_references(path: str) -> tuple[Captions, dict[str, list[int | str]]]:
    """Read a COCO captions file; the images themselves are not needed.

    Returns:
        Captions by image id, for images that have any; and ids by base name of `file_name`.
    """
    content = read_json(path)
    captions: Captions = {}
    names: dict[str, list[int | str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(_id(annotation["image_id"]), []).append(
                _text(annotation["caption"])
            )
        for image in content["images"]:
            base = os.path.basename(_text(image["file_name"]))
            names.setdefault(base, []).append(_id(image["id"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected COCO captions: `images` (id, file_name) and `annotations` "
            f"(image_id, caption); wrong or missing: {error}."
        ) from error
    if not captions:
        raise InputError(f"{path}: it has no captions.")
    return captions, names


def read_predictions(
    path: str, references: Captions, names: dict[str, list[int | str]]
) -> Captions:
    """Read one caption for each image of the references.

    Args:
        path: JSON lines with `caption` and `file` (as tools/caption_images.py writes) or
            `image_id`; or COCO results, a JSON list of `image_id` and `caption`.
        references, names: of `read_references`.
    """
    captions: Captions = {}
    for place, entry in _entries(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise InputError(f"{path}: {place} has no `caption`: {json.dumps(entry)[:120]}")
        given = entry.get("image_id")  # null is not given
        image_id = _id_of(entry, names, path, place) if given is None else as_id(given)
        if image_id is None:
            raise InputError(f"{path}: {place}: `image_id` {given!r} is no number or text.")
        if image_id in captions:
            raise InputError(f"{path}: {place}: image {image_id} has a caption already.")
        captions[image_id] = [entry["caption"]]
    _compare(path, captions, references)
    return {image_id: captions[image_id] for image_id in references}


def _entries(path: str) -> list[tuple[str, Any]]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return [(f"entry {index}", entry) for index, entry in enumerate(json.loads(text))]
        except ValueError as error:
            raise InputError(f"{path}: expected a JSON list, but it is not: {error}.") from error
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}.") from error
    return entries


def _id_of(entry: dict, names: dict[str, list[int | str]], path: str, place: str) -> int | str:
    name = os.path.basename(str(entry.get("file", "")))
    found = names.get(name, [])
    if len(found) != 1:
        what = f"{len(found)} images of the references are" if found else "no reference image is"
        near = next((n for n in names if not found and plain_name(n) == plain_name(name)), "")
        hint = f" There is {near!r}: names must be the same to the letter." if near else ""
        raise InputError(
            f"{path}: {place}: {what} called {name!r}.{hint} Give each entry the `image_id` of the "
            "references."
        )
    return found[0]


def _compare(path: str, captions: Captions, references: Captions) -> None:
    without = [json.dumps(image_id) for image_id in references if image_id not in captions]
    unknown = [json.dumps(image_id) for image_id in captions if image_id not in references]
    problems = []
    if without:
        problems.append(
            f"{len(without)} images of the references have no caption: {_first(without)}"
        )
    if unknown:
        problems.append(f"{len(unknown)} image ids are not in the references: {_first(unknown)}")
    if problems:
        advice = of_another_type([i for i in captions if i not in references], references)
        advice = advice or "Both files must be of the same images."
        raise InputError(f"{path}: {'; '.join(problems)}. {advice}")


def _first(ids: list[str]) -> str:
    return ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"{caption!r}, which is no text")
    return caption


def _id(value: Any) -> int | str:
    if (image_id := as_id(value)) is None:
        raise TypeError(f"the id {value!r}, which is no number or text")
    return image_id
