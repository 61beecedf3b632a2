"""Karpathy's splits: one JSON file of `images`, each with its split and its `sentences`."""

import os
from collections import Counter
from typing import Any

from pretrain.data.checks import read_annotations, refuse, refuse_absent
from pretrain.data.coco import as_id, elements, is_text, list_of
from pretrain.data.records import Records
from virtex_d2.engine.errors import InputError

# What an image is known by: the first that is given.
_IDS = ("cocoid", "imgid", "filename")


def load_karpathy_captions(
    json_path: str | os.PathLike, image_root: str | os.PathLike, split: str
) -> Records:
    """Read a file as dataset_coco.json (Karpathy and Fei-Fei, CVPR 2015).

    Args:
        json_path: the annotation file.
        image_root: the folder that `filepath`/`filename` is relative to.
        split: names of splits joined by "+", for example "train+restval".

    Returns:
        Records of the splits in the file's order. The id is `cocoid`, else `imgid`, else the name.
    """
    images = list_of(read_annotations(json_path, "karpathy"), "images", json_path)
    refuse(
        json_path,
        elements("images", images, lambda image: not _is_image(image)),
        "images lack a `filename`, a `split` or a text in each `sentences[].raw`",
        "Remove them or fill them in. Is it a file of Karpathy's splits?",
    )
    found = Counter(image["split"] for image in images)
    wanted = split.split("+")
    if absent := [name for name in wanted if name not in found]:
        listed = ", ".join(f"{name} ({count} images)" for name, count in found.items())
        raise InputError(
            f"{json_path}: the split {absent[0]!r} has no images; the file has {listed or 'none'}. "
            "Name one of these as DATA.TRAIN_SPLIT or DATA.VAL_SPLIT, or several joined by '+'."
        )
    images = [image for image in images if image["split"] in wanted]
    ids = [next(i for i in map(as_id, map(image.get, _IDS)) if i is not None) for image in images]
    refuse(
        json_path,
        [str(image_id) for image_id, count in Counter(ids).items() if count > 1],
        "image ids are given twice",
        "Give each image an id (`cocoid`, else `imgid`) of its own.",
    )
    names = [os.path.join(image.get("filepath") or "", image["filename"]) for image in images]
    refuse_absent(names, json_path, image_root)
    captions = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    return Records.of_files(ids, names, captions, image_root)


def _is_image(image: Any) -> bool:
    return (
        isinstance(image, dict)
        and is_text(image.get("filename"))
        and isinstance(image.get("filepath"), str | None)
        and is_text(image.get("split"))
        and all(as_id(image[key]) is not None for key in _IDS if image.get(key) is not None)
        and isinstance(image.get("sentences"), list)
        and len(image["sentences"]) > 0
        and all(isinstance(s, dict) and is_text(s.get("raw")) for s in image["sentences"])
    )
