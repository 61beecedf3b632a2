"""The whole check of one data set."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from virtex_d2.annotations.checks.boxes import box_problems
from virtex_d2.annotations.checks.images import (
    Decoded,
    decode_images,
    image_problems,
    missing_images,
)
from virtex_d2.annotations.checks.kinds import KINDS
from virtex_d2.annotations.checks.masks import mask_kinds, mask_problems
from virtex_d2.annotations.table import AnnotationTable, Problem


@dataclass
class Checked:
    """A data set and what is wrong with it.

    Attributes:
        table: the data set.
        problems: of its annotations, its images, and leaks into it.
        decoded: by image index, what the files turned out to be; of a sample only, or of none.
    """

    table: AnnotationTable
    problems: list[Problem]
    decoded: dict[int, Decoded] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether there is no serious problem."""
        return not any(KINDS[problem.kind].serious for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems in the order of KINDS."""
        groups: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        for problem in self.problems:
            groups[problem.kind].append(problem)
        return {kind: problems for kind, problems in groups.items() if problems}


def check(
    table: AnnotationTable, decode: bool = True, sample: int = 0, seed: int = 0, workers: int = 1
) -> Checked:
    """Check a data set's annotations and image files.

    Args:
        table: the data set.
        decode: whether to decode images; that they are there is seen in any case.
        sample: decode so many, drawn with `seed`; 0: all.
        workers: processes that decode.
    """
    problems = [*table.problems, *box_problems(table), *mask_problems(table)]
    missing = missing_images(table)
    decoded: dict[int, Decoded] = {}
    if decode:
        there = sorted(set(range(len(table.files))) - set(missing))
        there = [index for index in there if table.files[index]]
        if 0 < sample < len(there):
            there = sorted(random.Random(seed).sample(there, sample))
        found = decode_images([table.files[index] for index in there], workers, table.name)
        decoded = dict(zip(there, found))
    problems += image_problems(table, missing, decoded)
    return Checked(table, problems, decoded)


def summary(checked: Checked) -> dict[str, Any]:
    """The counts of the page and of the JSON output, as plain values."""
    table = checked.table
    masks = Counter(mask_kinds(table).tolist())
    sizes = table.sizes[~np.isnan(table.sizes).any(axis=1)]
    kept = (table.boxes[:, 2:] > 0).all(axis=1) & ~table.crowd
    areas = table.boxes[kept, 2:].prod(axis=1)
    small, large = 32**2, 96**2  # pixels; COCO's bounds of small, medium and large
    return {
        "name": table.name,
        "type": table.kind,
        "source": table.source,
        "images": len(table.image_ids),
        "images_without_objects": sum(not len(rows) for rows in table.objects_by_image()),
        "images_decoded": len(checked.decoded),
        "smallest_sides": _extreme(sizes, np.min),
        "largest_sides": _extreme(sizes, np.max),
        "objects": len(table.records),
        "crowd": int(table.crowd.sum()),
        "difficult": int(table.difficult.sum()),
        "objects_by_size": {
            "small": int((areas < small).sum()),
            "medium": int(((areas >= small) & (areas < large)).sum()),
            "large": int((areas >= large).sum()),
        },
        "masks": {kind: masks[kind] for kind in ("polygons", "run-length", "none", "other")},
        "classes": _classes(table),
        "problems": {kind: len(found) for kind, found in checked.by_kind().items()},
    }


def _extreme(sizes: np.ndarray, of: Any) -> Sequence[int]:
    return [int(side) for side in of(sizes, axis=0)] if len(sizes) else []


def _classes(table: AnnotationTable) -> list[dict[str, Any]]:
    known = (table.category_of >= 0) & (table.image_of >= 0)
    instances = np.bincount(table.category_of[known], minlength=len(table.categories))
    pairs = np.unique(np.stack([table.category_of[known], table.image_of[known]]), axis=1)
    images = np.bincount(pairs[0], minlength=len(table.categories))
    return [
        {"id": key, "name": name, "instances": int(count), "images": int(image_count)}
        for (key, name), count, image_count in zip(table.categories.items(), instances, images)
    ]
