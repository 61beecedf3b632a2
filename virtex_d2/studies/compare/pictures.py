"""The same images with the predictions of every start beside the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_entries
from virtex_d2.detection.sources import read_catalog
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.runs import Run, find_predictions
from virtex_d2.studies.compare.tables import Block
from virtex_d2.studies.reporting.page import Picture
from virtex_d2.studies.viewer.drawing import draw_instances, grid, read_pixels, with_legend
from virtex_d2.studies.viewer.matching import Instance, match, objects
from virtex_d2.studies.viewer.results import read_results

NUM_IMAGES = 6
_SIDE = 300  # pixels of an image's longer side


def draw(folder: Path, blocks: Sequence[Block]) -> tuple[list[Picture], str]:
    """One picture for each block: the first test images with an object, none chosen.

    Of each start, as many predictions are taken as the image has objects, those of highest score:
    no threshold is tuned. The runs are those of the first seed that all starts have.

    Args:
        folder: where the PNGs go.
        blocks: the finished runs.

    Returns:
        The pictures, and HTML that says of which blocks there are none, and why.
    """
    pictures, missing = [], []
    for number, block in enumerate(blocks):
        title = block.title
        shared = set.intersection(*(set(runs) for runs in block.complete.values()))
        if not shared:
            missing.append(f"{title}: no seed is finished for all starts.")
            continue
        seed = min(shared)
        path = folder / f"predictions{number}.png"
        try:
            _draw(path, {init: runs[seed] for init, runs in block.complete.items()})
        except InputError as error:
            # Data sets may be on another machine than the report: it is complete but for this.
            missing.append(f"{title}: {error}")
            continue
        pictures.append(
            Picture(
                path,
                "Test images with their true objects, and with the predictions of each start",
                f"{title}: the first test images with an object, seed {seed}; of each start as "
                "many predictions as the image has objects, those of the highest score.",
            )
        )
    note = "".join(f"<p>No pictures of predictions for {escape(text)}</p>" for text in missing)
    return pictures, note


def _draw(path: Path, runs: Mapping[str, Run]) -> None:
    table = _test_set(next(iter(runs.values())))
    predictions = {}
    for init, run in runs.items():
        found = find_predictions(run.folder)
        if found is None:
            raise InputError(f"{run.folder / 'inference'}: holds no predictions.")
        predictions[init] = read_results(str(found), table, 0.0)
    rows = table.objects_by_image()
    shown = 0
    panels = []
    for index, file in enumerate(table.files):
        if shown == NUM_IMAGES:
            break
        if not len(rows[index]):
            continue
        image = read_pixels(file)
        size = image.shape[:2]
        truth = objects(table, rows[index], size)
        counted = sum(not item.ignore for item in truth)
        if not counted:
            continue
        shown += 1
        plain = [replace(item, verdict="found") for item in truth]
        panels.append(("truth", draw_instances(image, plain, table.categories, side=_SIDE)))
        for init, by_image in predictions.items():
            best = sorted(by_image[index], key=lambda item: -item.score)[:counted]
            judged = match(truth, best, size, by=_form([*truth, *best])).predictions
            panels.append((init, draw_instances(image, judged, table.categories, side=_SIDE)))
    if not panels:
        raise InputError(f"{table.source}: no image has an object.")
    with_legend(grid(panels, columns=1 + len(predictions))).save(path)


def _form(items: Sequence[Instance]) -> str:
    return "segm" if all(item.segmentation for item in items) else "bbox"


def _test_set(run: Run) -> AnnotationTable:
    cfg = load_config(get_virtex_cfg(), str(run.folder / "config.yaml"), None)
    register_entries(cfg)
    return read_catalog(cfg.DATASETS.TEST[0])
