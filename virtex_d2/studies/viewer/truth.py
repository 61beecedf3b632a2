"""The objects of a data set, image by image, as they are drawn and matched."""

from collections.abc import Container, Iterable

import numpy as np

from virtex_d2.annotations.masks import mask_fault
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.studies.viewer.instances import Instance


def objects(
    table: AnnotationTable,
    rows: Iterable[int],
    size: tuple[int, int],
    broken: Container[str] = (),
) -> list[Instance]:
    """Objects of one image; without those that have no box, and masks that cannot be read.

    Objects of no class of the data set are left out, too, unless they are marked as broken.

    Args:
        table: the data set.
        rows: their indices.
        size: (height, width) of the image in pixels.
        broken: names of the records to mark as broken.
    """
    categories = list(table.categories)
    found = []
    for row in rows:
        x, y, width, height = table.boxes[row].tolist()
        mask, category = table.segmentations[row], table.category_of[row]
        is_broken = table.records[row] in broken
        if np.isnan(x) or (category < 0 and not is_broken):
            continue
        found.append(
            Instance(
                category=categories[category] if category >= 0 else "unknown",
                box=(x, y, x + width, y + height),
                segmentation=mask if mask and not mask_fault(mask, size) else None,
                ignore=bool(table.crowd[row] or table.difficult[row]),
                crowd=bool(table.crowd[row]),
                verdict="broken" if is_broken else "",
            )
        )
    return found
