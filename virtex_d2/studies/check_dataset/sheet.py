"""A contact sheet: images of a data set with boxes and masks drawn, broken ones marked."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from virtex_d2.annotations.checks import Checked
from virtex_d2.annotations.table import KINDS
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.studies.viewer.drawing import draw_instances, grid, read_pixels
from virtex_d2.studies.viewer.matching import objects

_SIDE, _COLUMNS = 460, 4  # pixels of an image's longer side; images in a row
_LEAST_SHARE = 3  # at most one image of so many is shown for its problem


def draw_sheets(path: str, datasets: Sequence[Checked], count: int, seed: int = 0) -> list[str]:
    """Draw images of each data set; with several sets, into one PNG each, numbered.

    Images with a problem come first, up to a third, of as many kinds as there are. The others are
    drawn by the seed among those with an object.

    Returns:
        The paths.
    """
    paths = []
    for number, checked in enumerate(datasets, start=1):
        target = Path(path)
        if len(datasets) > 1:
            target = target.with_name(f"{target.stem}-{number}{target.suffix}")
        panels = _panels(checked, count, seed)
        if not panels:
            continue
        picture = grid(panels, _COLUMNS, checked.table.name)
        try:
            with atomic_path(target) as temporary:
                picture.save(temporary, format="PNG")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--contact-sheet {target}: cannot be written: {reason}.") from error
        paths.append(os.fspath(target))
    return paths


def _panels(checked: Checked, count: int, seed: int) -> list[tuple[str, np.ndarray]]:
    table = checked.table
    by_image = table.objects_by_image()
    index_of = {file: index for index, file in reversed(list(enumerate(table.files)))}
    broken = {problem.record for problem in checked.problems if KINDS[problem.kind].serious}
    reason: dict[int, str] = {}
    for kind, found in checked.by_kind().items():  # the first image of each kind
        images = (index_of.get(problem.image) for problem in found if KINDS[kind].serious)
        if (
            image := next((i for i in images if i is not None and i not in reason), None)
        ) is not None:
            reason[image] = KINDS[kind].title
    others = [index for index, rows in enumerate(by_image) if len(rows) and index not in reason]
    random.Random(seed).shuffle(others)
    first = list(reason)[: max(1, count // _LEAST_SHARE)]
    panels = []
    for index in [*first, *others]:
        if len(panels) == count:
            break
        try:
            image = read_pixels(table.files[index])
        except InputError:  # named on the page already
            continue
        drawn = draw_instances(
            image,
            objects(table, by_image[index], image.shape[:2], broken),
            table.categories,
            side=_SIDE,
        )
        title = os.path.basename(table.files[index])
        panels.append((f"{title}: {reason[index]}" if index in reason else title, drawn))
    return panels
