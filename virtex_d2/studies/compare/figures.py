"""The comparison's pictures. One colour is one start throughout."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from virtex_d2.studies.compare.runs import TASKS, Metric
from virtex_d2.studies.compare.tables import FREQUENCIES, SIZES, Block, difference_text
from virtex_d2.studies.reporting.metrics import Curve
from virtex_d2.studies.reporting.plots import (
    INK,
    MUTED,
    RULE,
    STYLE,
    draw_seeds,
    finish,
    mean_end,
    save,
)

# The baseline first. Told apart by people of any colour vision; dark enough for text on white.
COLORS = (
    *("#6B5B53", "#0A5FA5", "#C8590A", "#00805E", "#A03A86", "#8A7100", "#2E9CCA", "#B3263A"),
)
_WIDTH = 9.6  # inches, 1000 pixels of a page
MOST_CLASSES = 40  # in a picture; those that change most


def colors(inits: Sequence[str]) -> dict[str, str]:
    """A colour for each start."""
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
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
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
    color = colors(list(block.runs))[init]
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
        figure = Figure(figsize=(_WIDTH, 3.0 * len(blocks)), layout="constrained")
        panels = figure.subplots(len(blocks), len(metrics), squeeze=False)
        for row, block in zip(panels, blocks):
            for axes, metric in zip(row, metrics):
                axes.set_title(f"{metric.label}, {_place(block, blocks)}")
                labels = []
                for init, runs in block.complete.items():
                    color = colors(list(block.runs))[init]
                    curves = [
                        Curve(tuple(points), tuple(points.values()))
                        for points in (run.curves.get(metric) for run in runs.values())
                        if points
                    ]
                    draw_seeds(axes, curves, color, marker="o")
                    if curves:
                        labels.append((mean_end(curves), init, color))
                finish(axes, labels, number="{:.1f}", least_height=0.1)
        save(figure, path)


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
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.24 * max(3, len(names))), layout="constrained")
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
    several = len({block.config for block in blocks}) > 1
    return block.title if several else block.part
