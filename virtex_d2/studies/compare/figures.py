"""The comparison's pictures. One colour is one start throughout."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_entries
from virtex_d2.detection.sources import read_annotations, read_catalog
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.runs import TASKS, Metric, Run
from virtex_d2.studies.compare.tables import FREQUENCIES, SIZES, Block, difference_text
from virtex_d2.studies.curves import INK, MUTED, RULE, STYLE, WIDTH, draw_seeds, finish, save
from virtex_d2.studies.viewer.drawing import draw_instances, grid, read_pixels, with_legend
from virtex_d2.studies.viewer.matching import match, objects
from virtex_d2.studies.viewer.results import read_results

# The baseline first. Told apart by people of any colour vision; dark enough for text on white.
COLORS = (
    *("#6B5B53", "#0A5FA5", "#C8590A", "#00805E", "#A03A86", "#8A7100", "#2E9CCA", "#B3263A"),
)
MOST_CLASSES = 40  # in a picture; those that change most
NUM_IMAGES = 6  # with predictions
_SIDE = 300  # pixels of such an image's longer side


def colors(inits: Iterable[str]) -> dict[str, str]:
    """Give each start a colour."""
    return dict(zip(inits, COLORS))


def draw_differences(path: Path, blocks: Sequence[Block], metrics: Sequence[Metric]) -> None:
    """Each start's AP minus the baseline's: every seed, the mean, and its confidence interval.

    Args:
        path: of the PNG.
        blocks: one row of panels each.
        metrics: one column each.
    """
    others = [list(block.runs)[1:] for block in blocks]
    heights = [0.62 + 0.34 * len(names) for names in others]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
        panels = figure.subplots(
            *(len(blocks), len(metrics)), squeeze=False, sharex="col", height_ratios=heights
        )
        for row, block, names in zip(panels, blocks, others):
            for axes, metric in zip(row, metrics):
                axes.set_title(f"{metric.label}, {_place(block, blocks)}")
                axes.axvline(0, color=MUTED, lw=1)
                for place, name in enumerate(names):
                    _draw_difference(axes, block, name, metric, -place)
                axes.set_yticks(
                    [-place for place in range(len(names))], names if axes is row[0] else []
                )
                axes.set_ylim(-len(names) + 0.4, 0.6)
                axes.spines["left"].set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel(f"points of AP above {blocks[0].baseline}")
        for axes in panels[0]:
            low, high = axes.get_xlim()
            low, high = min(low, -0.5), max(high, 0.5)
            room = 0.14 * (high - low)  # for the numbers above the points
            axes.set_xlim(low - room, high + room)
        save(figure, path)


def _draw_difference(axes: Axes, block: Block, init: str, metric: Metric, place: int) -> None:
    diff = block.difference(init, metric)
    if not diff.values:
        axes.text(0, place, " no runs to pair yet", color=MUTED, fontsize=8, va="center")
        return
    color = colors(block.runs)[init]
    if diff.interval:
        axes.plot(diff.interval, (place, place), color=color, lw=2.4, alpha=0.85)
    values = list(diff.values.values())
    axes.plot(values, [place] * len(values), "|", color=color, ms=9, mew=1)
    axes.plot(diff.mean, place, "o", color=color, ms=7, mec="white", mew=0.8, zorder=4)
    axes.annotate(
        difference_text(diff),
        xy=(diff.mean, place),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=7.5,
        color=INK,
    )


def draw_curves(path: Path, blocks: Sequence[Block], metrics: Sequence[Metric]) -> None:
    """AP against iterations: a thin line a seed, a thick one for the mean.

    Args:
        path: of the PNG.
        blocks: one row of panels each.
        metrics: one column each.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0 * len(blocks)), layout="constrained")
        panels = figure.subplots(len(blocks), len(metrics), squeeze=False)
        for row, block in zip(panels, blocks):
            for axes, metric in zip(row, metrics):
                draw_curve(axes, block, metric, f"{metric.label}, {_place(block, blocks)}")
        save(figure, path)


def draw_curve(axes: Axes, block: Block, metric: Metric, title: str) -> None:
    """Draw one result of every start against iterations."""
    axes.set_title(title)
    labels = []
    for init, color in colors(block.runs).items():
        curves = [run.curves.get(metric, {}) for run in block.runs[init].values()]
        end = draw_seeds(axes, curves, color, marker="o")
        if end is not None:
            labels.append((end, init, color))
    finish(axes, labels, number="{:.1f}", least_height=0.1)


def draw_classes(path: Path, block: Block, task: str) -> int:
    """AP by size or frequency and by class, minus the baseline's: each start's mean over seeds.

    Args:
        path: of the PNG.
        block: the runs.
        task: "bbox" or "segm".

    Returns:
        How many classes are left out, those that change least: `MOST_CLASSES` have room.
    """
    inits = list(block.runs)
    others = [init for init in list(block.complete) if init != block.baseline]
    metrics = [m for m in block.metrics if m.task == task and not m.kind]
    rows: dict[str, dict[str, float]] = {}
    for metric in metrics:
        if metric.name in SIZES + FREQUENCIES or metric.class_name:
            found = {init: block.difference(init, metric).mean for init in others}
            if not all(map(math.isnan, found.values())):
                rows[metric.class_name or _GROUPS[metric.name]] = found
    groups = [name for name in _GROUPS.values() if name in rows]
    classes = sorted(
        (name for name in rows if name not in groups), key=lambda name: -_size(rows[name])
    )
    shown = sorted(classes[:MOST_CLASSES], key=lambda name: -np.nanmean([*rows[name].values()]))
    names = [*groups, *shown]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.24 * max(3, len(names))), layout="constrained")
        axes = figure.subplots()
        axes.set_title(
            f"{block.config}: {TASKS[task]} AP minus that of {block.baseline}, mean over seeds"
        )
        axes.axvline(0, color=MUTED, lw=1)
        for place, name in enumerate(names):
            axes.axhline(-place, color=RULE, lw=0.5, zorder=0)
            for number, init in enumerate(others):
                shift = 0.12 * (number - (len(others) - 1) / 2)  # equal ones are seen, too
                axes.plot(
                    *(rows[name][init], -place - shift, "o"),
                    color=colors(inits)[init],
                    ms=6,
                    mec="white",
                    mew=0.7,
                    label=init if place == 0 else None,
                )
        if groups and shown:
            axes.axhline(0.5 - len(groups), color=MUTED, lw=0.8)
        axes.set_yticks([-place for place in range(len(names))], names)
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("points of AP")
        if names:
            figure.legend(loc="outside lower left", ncols=len(others), frameon=False)
        save(figure, path)
    return len(classes) - len(shown)


_GROUPS = {
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "APr": "rare classes",
    "APc": "common classes",
    "APf": "frequent classes",
}


def _size(differences: Mapping[str, float]) -> float:
    return float(np.nanmax(np.abs([*differences.values()])))


def _place(block: Block, blocks: Sequence[Block]) -> str:
    """What tells a block from the others."""
    several = len({block.name for block in blocks}) > 1
    return block.title if several else block.part


Panels = list[tuple[str, np.ndarray]]  # titles with images, (H, W, 3) uint8 RGB


def prediction_panels(
    block: Block, root: Path, count: int = NUM_IMAGES
) -> tuple[int, list[Panels]]:
    """Show the truth and each start's predictions of the first test images with an object.

    None is chosen, and no threshold tuned: of each start as many predictions are taken as the image
    has objects, those of highest score.

    Args:
        block: the runs.
        root: where relative paths of their data sets begin.
        count: of images.

    Returns:
        The first seed that all starts have, of which they are; a row for each image.
    """
    shared = set.intersection(*(set(runs) for runs in block.complete.values()))
    if not shared:
        raise InputError("no seed is finished for all starts.")
    runs = {init: runs[min(shared)] for init, runs in block.complete.items()}
    table = _test_set(next(iter(runs.values())), root)
    predictions = {init: read_results(_results(run), table, 0.0) for init, run in runs.items()}
    panels: list[Panels] = []
    for index, rows in enumerate(table.objects_by_image()):
        if len(panels) == count or not len(rows):
            continue
        image = read_pixels(table.files[index])
        truth = objects(table, rows, image.shape[:2])
        counted = sum(not item.ignore for item in truth)
        if not counted:
            continue
        shown = {"truth": [replace(item, verdict="found") for item in truth]}
        for init, by_image in predictions.items():
            best = sorted(by_image[index], key=lambda item: -item.score)[:counted]
            masked = all(item.segmentation for item in [*truth, *best])
            judged = match(truth, best, image.shape[:2], by="segm" if masked else "bbox")
            shown[init] = list(judged.predictions)
        panels.append(
            [
                (name, draw_instances(image, items, table.categories, side=_SIDE))
                for name, items in shown.items()
            ]
        )
    if not panels:
        raise InputError(f"{table.source}: no image has an object.")
    return min(shared), panels


def draw_predictions(path: Path, rows: Sequence[Panels]) -> None:
    """Draw what `prediction_panels` gives, with a legend."""
    with_legend(grid([panel for row in rows for panel in row], columns=len(rows[0]))).save(path)


def _results(run: Run) -> str:
    """Find a detector's stored predictions; with several test sets, those of the first by name."""
    found = sorted((run.folder / "inference").rglob("*_instances_results.json"))
    if not found:
        raise InputError(f"{run.folder / 'inference'}: holds no predictions.")
    return str(found[0])


def _test_set(run: Run, root: Path) -> AnnotationTable:
    cfg = load_config(get_virtex_cfg(), str(run.folder / "config.yaml"), None)
    name = cfg.DATASETS.TEST[0]
    for known, kind, *words in cfg.VIRTEX.DATASETS:
        if known == name and kind in ("coco", "lvis"):  # past the catalog, where names are unique
            return read_annotations((kind, *(str(root / word) for word in words)), name)
    register_entries(cfg)
    return read_catalog(name)
