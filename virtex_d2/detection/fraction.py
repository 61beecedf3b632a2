"""A fraction of a training set's images: nested, and the same on every machine."""

import hashlib
import logging
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


def check_fraction(fraction: float, name: str = "", num_images: int = 0) -> None:
    """Raise InputError if the fraction is not in (0, 1], or comes to none of the images."""
    if not 0 < fraction <= 1:
        raise InputError(f"VIRTEX.FRACTION {fraction}: expected more than 0, up to 1 for all.")
    if name and not round(fraction * num_images):
        raise InputError(
            f"VIRTEX.FRACTION {fraction} of the {num_images} images of '{name}' is none: use at "
            f"least {1 / num_images:.2g}."
        )


def take_fraction(records: list[dict[str, Any]], fraction: float, seed: int) -> list[dict]:
    """The first records of an order that is drawn for each image by its id, in their own order.

    Subsets of one seed are nested: 2 % of the images are among 5 %. An image's place in the order
    depends on its `image_id` and the seed alone, so that sets that share images and ids, such as
    COCO and LVIS, agree on which come first.

    Args:
        records: detectron2's, each with `image_id`.
        fraction: in (0, 1], rounded to the nearest number of images.
        seed: any number.
    """
    count = round(fraction * len(records))
    drawn = sorted(range(len(records)), key=lambda place: _luck(records[place]["image_id"], seed))
    return [records[place] for place in sorted(drawn[:count])]


def register_fraction(name: str, fraction: float, seed: int) -> str:
    """Register a fraction of a data set under a name of its own, which is returned.

    For the catalog's readers it is a data set like any other: with the classes of the whole.
    """
    if fraction == 1:
        return name
    part = f"{name}@{fraction!r}-of-seed-{seed}"
    if part not in DatasetCatalog:
        DatasetCatalog.register(part, lambda: _load(name, part, fraction, seed))
    return part


def _load(name: str, part: str, fraction: float, seed: int) -> list[dict[str, Any]]:
    records = DatasetCatalog.get(name)
    check_fraction(fraction, name, len(records))
    # Known after loading: COCO's loader finds them in the file.
    MetadataCatalog.get(part).set(thing_classes=MetadataCatalog.get(name).thing_classes)
    taken = take_fraction(records, fraction, seed)
    logger.info(
        "VIRTEX.FRACTION %g (VIRTEX.FRACTION_SEED %d): %d of %d images of %s, %d of %d annotations",
        fraction,
        seed,
        len(taken),
        len(records),
        name,
        _annotations(taken),
        _annotations(records),
    )
    if not any(not item.get("iscrowd") for record in taken for item in record["annotations"]):
        raise InputError(
            f"VIRTEX.FRACTION {fraction}: none of the {len(taken)} images of '{name}' that it "
            "selects has an annotation to learn from. Use a larger fraction, or another "
            "VIRTEX.FRACTION_SEED."
        )
    return taken


def _annotations(records: list[dict[str, Any]]) -> int:
    return sum(len(record["annotations"]) for record in records)


def _luck(image_id: int | str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
