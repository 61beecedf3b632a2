"""Writes splits of the synthetic world in the layouts that detection people have.

    output/images/<split>/000000.jpg ...
    output/annotations/captions_<split>.json    COCO captions
    output/annotations/instances_<split>.json   COCO instances, polygons of the visible masks
    output/annotations/lvis_v1_<split>.json     LVIS v1
    output/VOC/{Annotations,JPEGImages,ImageSets/Main}

Images are JPEGs (quality 95, no chroma subsampling): what VOC's layout and users' loaders expect.
libjpeg-turbo's default transform is integer arithmetic, the same on every processor.
"""

import json
import os
import shutil
import uuid
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.studies.shapes import FORMATS, MOST_OBJECTS
from virtex_d2.studies.shapes.world import CLASSES, Scene, check_world, render

_INFO = {"description": "synthetic shapes"}
_LICENSE = {"id": 1, "name": "Apache-2.0", "url": ""}
_LEAST_POINTS = 3  # a polygon of fewer encloses nothing


def write_dataset(
    output: str | os.PathLike,
    split: str,
    num_images: int,
    size: int = 128,
    seed: int = 0,
    formats: Iterable[str] = ("coco",),
    max_objects: int = MOST_OBJECTS,
    overwrite: bool = False,
) -> None:
    """Write a split: images, captions and annotations, all or nothing.

    Args:
        output: the world's folder; other splits in it stay as they are.
        seed: of the world. Splits of one seed share their images: take another for each.
        formats: of FORMATS; COCO's files are always written.
        overwrite: replace the split where it exists, in every format that it was written in.
    """
    formats = tuple(formats)
    _check_arguments(split, num_images, formats)
    seed, size, max_objects = check_world(seed, size, max_objects)
    output = Path(output)
    images = output / "images" / split
    if images.exists() and not overwrite:
        raise InputError(
            f"{images}: the split exists already. Choose another --output or --split, or replace "
            "it with --overwrite."
        )
    temporary = output / f".tmp-{split}-{uuid.uuid4().hex[:12]}"
    try:
        (temporary / "images").mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"--output {output}: no folder can be made there ({error.strerror}). Choose another."
        ) from error
    try:
        records = _Records(split, size)
        for index in range(num_images):
            scene = render(seed, index, size, max_objects)
            name = f"{index:06d}.jpg"
            path = temporary / "images" / name
            Image.fromarray(scene.image).save(path, quality=95, subsampling=0)
            records.add(name, scene)
            if "voc" in formats:
                _write_voc(temporary / "VOC", split, path, scene)
        records.write_coco(temporary / "annotations")
        if "lvis" in formats:
            records.write_lvis(temporary / "annotations")
        _remove_split(output, split)
        for path in [*temporary.glob("VOC/**/*"), *temporary.glob("annotations/*")]:
            if path.is_file():
                _replace(path, output / path.relative_to(temporary))
        _replace(temporary / "images", images)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outline a mask (H, W) bool as COCO polygons [x0, y0, x1, y1, ...], in pixels.

    A contour runs through the centres of the outermost pixels and so loses half a pixel around; on
    an image of doubled pixels it loses a quarter. COCO's polygons have no holes: a part with one is
    cut in two through it.
    """
    mask = mask.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return []
    doubled = mask[y : y + height, x : x + width].repeat(2, axis=0).repeat(2, axis=1)
    return [
        ((contour.reshape(-1, 2) + 0.5) / 2 + (x, y)).flatten().tolist()
        for contour in _outlines(doubled)
    ]


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # of each contour [next, previous, child, parent]; None for no contour
    parents = [] if hierarchy is None else hierarchy.reshape(-1, 4)[:, 3]
    holes = [contour for contour, parent in zip(contours, parents) if parent >= 0]
    if not holes:
        return [contour for contour in contours if len(contour) >= _LEAST_POINTS]
    x, _, width, _ = cv2.boundingRect(holes[0])
    left, right = mask.copy(), mask.copy()
    left[:, x + width // 2 :] = 0
    right[:, : x + width // 2] = 0
    return _outlines(left) + _outlines(right)


class _Records:
    """The records of a split's JSON files; ids count from 1."""

    def __init__(self, split: str, size: int):
        self._split = split
        self._size = size
        self._images: list[dict] = []
        self._captions: list[dict] = []
        self._annotations: list[dict] = []

    def add(self, file_name: str, scene: Scene) -> None:
        image_id = len(self._images) + 1
        self._images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "height": self._size,
                "width": self._size,
                "license": _LICENSE["id"],
            }
        )
        for text in scene.captions:
            self._captions.append(
                {"id": len(self._captions) + 1, "image_id": image_id, "caption": text}
            )
        for item in scene.objects:
            if outline := polygons(item.mask):
                self._annotations.append(
                    {
                        "id": len(self._annotations) + 1,
                        "image_id": image_id,
                        "category_id": CLASSES.index(item.name) + 1,
                        "bbox": list(item.box),
                        "area": int(np.count_nonzero(item.mask)),
                        "segmentation": outline,
                        "iscrowd": 0,
                    }
                )

    def write_coco(self, folder: Path) -> None:
        """Write COCO captions and COCO instances."""
        categories = [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CLASSES, start=1)
        ]
        _write_json(folder / f"captions_{self._split}.json", self._images, self._captions)
        _write_json(
            folder / f"instances_{self._split}.json", self._images, self._annotations, categories
        )

    def write_lvis(self, folder: Path) -> None:
        """Write LVIS v1: federated annotations; here every class of every image is known."""
        present: dict[int, set[int]] = defaultdict(set)
        for annotation in self._annotations:
            present[annotation["image_id"]].add(annotation["category_id"])
        numbers = range(1, len(CLASSES) + 1)
        images = [
            {
                **_without(image, "file_name"),
                # LVIS takes the file's name from the end of this address
                "coco_url": f"shapes/{self._split}/{image['file_name']}",
                "neg_category_ids": sorted(set(numbers) - present[image["id"]]),
                "not_exhaustive_category_ids": [],
            }
            for image in self._images
        ]
        instance_counts = Counter(a["category_id"] for a in self._annotations)
        image_counts = Counter(number for ids in present.values() for number in ids)
        categories = [
            {
                "id": number,
                "name": name,
                "synset": f"{name}.n.01",
                "synonyms": [name],
                "def": f"a {name}",
                "frequency": _frequency(image_counts[number]),
                "image_count": image_counts[number],
                "instance_count": instance_counts[number],
            }
            for number, name in zip(numbers, CLASSES)
        ]
        annotations = [_without(annotation, "iscrowd") for annotation in self._annotations]
        _write_json(folder / f"lvis_v1_{self._split}.json", images, annotations, categories)


def _write_voc(folder: Path, split: str, image: Path, scene: Scene) -> None:
    """Write an image of Pascal VOC: its XML file, where corners are 1-based and inclusive; the
    JPEG; a line of the split's list.
    """
    stem = f"{split}_{image.stem}"
    height, width, depth = scene.image.shape
    root = ET.Element("annotation")
    _add(root, {"folder": "VOC", "filename": f"{stem}.jpg"})
    _add(ET.SubElement(root, "size"), {"width": width, "height": height, "depth": depth})
    for item in scene.objects:
        x, y, width, height = item.box
        node = ET.SubElement(root, "object")
        _add(node, {"name": item.name, "pose": "Unspecified", "truncated": 0, "difficult": 0})
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        _add(ET.SubElement(node, "bndbox"), corners)
    ET.indent(root)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ET.ElementTree(root).write(folder / "Annotations" / f"{stem}.xml")
    shutil.copyfile(image, folder / "JPEGImages" / f"{stem}.jpg")
    with open(folder / "ImageSets" / "Main" / f"{split}.txt", "a", encoding="utf-8") as file:
        file.write(f"{stem}\n")


def _add(node: ET.Element, texts: dict[str, object]) -> None:
    for name, text in texts.items():
        ET.SubElement(node, name).text = str(text)


def _check_arguments(split: str, num_images: int, formats: tuple[str, ...]) -> None:
    if not split or not all(char.isalnum() or char in "_-" for char in split):
        raise InputError(f"--split {split!r}: expected letters, digits, - and _ only.")
    if num_images < 1:
        raise InputError(f"--num-images {num_images}: expected at least 1.")
    for name in formats:
        if name not in FORMATS:
            raise InputError(
                f"--format {name}: not one of {', '.join(FORMATS)}.{nearest(name, FORMATS)}"
            )


def _remove_split(output: Path, split: str) -> None:
    """Remove what an earlier call wrote of a split, in all formats, if it did.

    The images go first and come last: a split whose folder of images is there is complete.
    """
    images = output / "images" / split
    if images.exists():
        shutil.rmtree(images)
    for kind in ("captions", "instances", "lvis_v1"):
        (output / "annotations" / f"{kind}_{split}.json").unlink(missing_ok=True)
    names = output / "VOC" / "ImageSets" / "Main" / f"{split}.txt"
    if names.exists():
        for stem in names.read_text().split():
            (output / "VOC" / "Annotations" / f"{stem}.xml").unlink(missing_ok=True)
            (output / "VOC" / "JPEGImages" / f"{stem}.jpg").unlink(missing_ok=True)
        names.unlink()


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _write_json(
    path: Path, images: list[dict], annotations: list[dict], categories: list[dict] | None = None
) -> None:
    content = {"info": _INFO, "licenses": [_LICENSE], "images": images, "annotations": annotations}
    if categories:
        content["categories"] = categories
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _without(record: dict, key: str) -> dict:
    return {name: value for name, value in record.items() if name != key}


def _frequency(image_count: int) -> str:
    """LVIS's rare, common and frequent: up to 10 images, up to 100, more."""
    if image_count <= 10:
        return "r"
    return "c" if image_count <= 100 else "f"
