"""What benchmarks/photographs.py has recorded, as tables and curves."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.photographs_arms import Arm
from virtex_d2.engine.files import read_json
from virtex_d2.studies import curves
from virtex_d2.studies.compare.figures import COLORS
from virtex_d2.studies.compare.tables import difference_text, value_text
from virtex_d2.studies.verdict import Sample, difference, sample, visible

# Frozen R-50, VOC07's twenty classes, mAP by thousands of images (arXiv 2006.06666, v3, figure on
# data efficiency). Other images, sizes and lengths than here: for the shape, not for the level.
PAPER = {
    "VirTex, 5 captions": {11.8: 69.3, 23.7: 76.7, 59: 84.8, 118: 88.7},
    "VirTex, 1 caption": {11.8: 63.0, 23.7: 70.5, 59: 79.4, 118: 84.2},
    "ImageNet labels": dict(
        zip((12.8, 25.6, 64, 128, 256, 641, 1281), (43.9, 56.4, 65.2, 73.9, 81.5, 86.1, 87.6))
    ),
}

Records = Mapping[tuple[str, int], Mapping[str, Any]]  # by arm and iterations


def read_records(results: Path, purpose: str, arms: Iterable[str], measure: str) -> Records:
    """Read what is recorded of a purpose, in the order of the arms."""
    found = [read_json(path) for path in (results / purpose).glob(f"*-{measure}.json")]
    by_place = {(record["arm"], record["iterations"]): record for record in found}
    return {
        (arm, iterations): by_place[arm, iterations]
        for arm in arms
        for iterations in sorted(length for name, length in by_place if name == arm)
    }


def values(record: Mapping[str, Any], figure: str) -> dict[int, float]:
    """A figure by seed."""
    return {
        int(seed): entry["figures"][figure]
        for seed, entry in record["seeds"].items()
        if figure in entry["figures"]
    }


def decision(diff: Sample) -> str:
    """Say whether a step is kept: only where its interval is above zero."""
    if diff.interval is None or not diff.decided:
        return "cannot be told" if diff.values else ""
    return "kept" if diff.interval[0] > 0 else "worse"


def report(records: Records, arms: Mapping[str, Arm], compared_with: str = "") -> str:
    """Lay out every figure, its paired difference from an arm's base, and the decision.

    Args:
        records: of `read_records`.
        arms: with each one's base.
        compared_with: a base for all of them instead.
    """
    if not records:
        return "Nothing is recorded yet."
    figures = list(
        dict.fromkeys(
            f for r in records.values() for e in r["seeds"].values() for f in e["figures"]
        )
    )
    rows, spreads = [], []
    for (arm, iterations), record in records.items():
        base = compared_with or arms[arm].base
        against = records.get((base, iterations), records.get((base, 0)))
        against = against if base != arm else None
        seeds = list(record["seeds"].values())
        row = [arm, iterations, len(seeds)]
        for figure in figures:
            own = values(record, figure)
            diff = difference(own, values(against, figure)) if against else sample({})
            row += [value_text(sample(own)), difference_text(diff) if diff.values else ""]
            if figure == figures[0]:
                verdict = decision(diff)
                if len(diff.values) > 1:
                    spreads.append(diff.deviation)
        scale = statistics.median(entry["scale"] for entry in seeds)
        spent = statistics.median(entry["seconds"]["pretrain"] for entry in seeds)
        rows.append([*row, base if against else "", verdict, f"{scale:.2g}", f"{spent:.0f}"])
    head = ["arm", "iterations", "seeds"]
    head += [word for figure in figures for word in (figure, "difference")]
    head += ["from", f"by {figures[0]}", "last scales", "seconds"]
    text = tabulate(rows, head, "github", disable_numparse=True)
    if spreads:
        spread = math.sqrt(statistics.fmean(one**2 for one in spreads))
        seen = ", ".join(f"{n} seeds {visible(spread, n):.1f}" for n in (3, 5, 8))
        text += (
            f"\n\nStandard deviation of paired differences in {figures[0]}, over {len(spreads)} "
            f"comparisons: {spread:.2f}. Smallest true difference seen in four of five cases: "
            f"{seen}."
        )
    return text


def views_table(records: Records) -> str:
    """Lay the means of the first figure out against image views, for arms of several lengths."""
    views = sorted({record["views"] for record in records.values() if record["views"]})
    if len(views) < 2:
        return ""
    figure = first_figure(records)
    rows: dict[str, dict[int, str]] = {}
    for (arm, _), record in records.items():
        if record["views"]:
            text = value_text(sample(values(record, figure)))
            rows.setdefault(arm, {})[record["views"]] = text
    head = [f"{figure} after so many views", *(f"{count:,}" for count in views)]
    cells = [[arm, *(row.get(count, "") for count in views)] for arm, row in rows.items()]
    return tabulate(cells, head, "github", disable_numparse=True)


def first_figure(records: Records) -> str:
    """The one that decides."""
    seeds = next(iter(records.values()))["seeds"]
    return next(iter(next(iter(seeds.values()))["figures"]))


def paper_table() -> str:
    """Lay the paper's points out against images."""
    images = sorted({count for points in PAPER.values() for count in points})
    rows = [[name, *(points.get(count, "") for count in images)] for name, points in PAPER.items()]
    head = ["paper: mAP by thousands of images", *(f"{count:g}" for count in images)]
    return tabulate(rows, head, "github", disable_numparse=True)


def draw(path: Path, title: str, axis: str, lines: Mapping[str, Sequence[curves.Curve]]) -> None:
    """Draw mAP against what `axis` says: a thin line for each seed, a thick one for the mean.

    Args:
        path: of the PNG.
        title, axis: texts.
        lines: by name, a curve for each seed.
    """
    with matplotlib.rc_context(curves.STYLE):
        figure = Figure(figsize=(curves.WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        labels = []
        for (name, seeds), color in zip(lines.items(), COLORS):
            end = curves.draw_seeds(axes, seeds, color, marker="o")
            labels.append((end, name, color))
        curves.finish(axes, labels, "{:.1f}")
        axes.set_xlabel(axis)
        curves.save(figure, path)


def lines_of(records: Records, arms: Mapping[str, Arm], axis: str) -> dict[str, list[curves.Curve]]:
    """Give curves of the first figure by seed, against "views" or "images".

    Untrained starts are a point at 0.
    """
    points: dict[str, dict[int, dict[int, float]]] = {}
    for (name, _), record in records.items():
        line = (axis == "images" and arms[name].line) or name
        for seed, value in values(record, first_figure(records)).items():
            points.setdefault(line, {}).setdefault(seed, {})[record[axis]] = value
    return {
        line: [dict(sorted(curve.items())) for curve in seeds.values()]
        for line, seeds in points.items()
    }
