"""The report's pictures. One colour is one start throughout; lines carry their own labels."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from virtex_d2.engine.files import read_json
from virtex_d2.studies.demo.masks import Instance, Picture
from virtex_d2.studies.demo.results import METRICS
from virtex_d2.studies.reporting.metrics import Metrics
from virtex_d2.studies.reporting.plots import (
    MUTED,
    STYLE,
    draw_seeds,
    finish,
    mean_end,
    save,
    show_image,
    xy,
)
from virtex_d2.studies.viewer.drawing import read_pixels

# Told apart by people of any colour vision, also in grey; dark enough for text on white.
COLORS = {"random": "#C8590A", "pretrained": "#0A5FA5", "truth": "#3C4043"}
LABELS = {"random": "random", "pretrained": "caption-pretrained", "truth": "ground truth"}
DIRECTION_COLORS = {"forward": "#0A5FA5", "backward": "#3FA7D6"}
LOSS_KEYS = {
    "forward": "loss_captioning_forward",
    "backward": "loss_captioning_backward",
}


def draw_pretraining(path: Path, runs: Sequence[Metrics]) -> None:
    """Caption loss of each direction against iteration, training and held-out images."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Caption loss, nats a token")
        labels = []
        for direction, key in LOSS_KEYS.items():
            color = DIRECTION_COLORS[direction]
            training = [run.curve(key) for run in runs]
            held_out = [run.curve(f"val/{key}") for run in runs]
            draw_seeds(axes, training, color)
            for curve in filter(None, held_out):
                axes.plot(
                    *xy(curve),
                    "o",
                    color=color,
                    mfc="white",
                    ms=5,
                    mew=1.4,
                    zorder=4,
                    clip_on=False,
                )
            if any(training):
                end = mean_end(training)
                words = f"{direction} {end:.2f}"
                if any(held_out):
                    words += f"\nheld out {mean_end(held_out):.2f}"
                labels.append((end, words, color))
        entropy = runs[0].curve("val/unigram_entropy")
        if entropy:
            axes.axhline(entropy.last, color=MUTED, lw=1, ls=(0, (5, 3)), zorder=1)
            labels.append((entropy.last, "word frequencies alone\n(unigram entropy)", MUTED))
        finish(axes, labels)
        axes.annotate(
            "lines: training images, with augmentation    circles: held-out images",
            xy=(0, 0),
            xytext=(0, -34),
            xycoords="axes fraction",
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
        )
        save(figure, path)


def draw_detectors(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> None:
    """Box AP, mask AP and training loss of both starts against iteration.

    Args:
        path: of the PNG.
        runs: of each start, one run a seed.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, metric in zip(panels, ("bbox/AP", "segm/AP")):
            draw_ap(axes, runs, metric)
        panels[2].set_title("Training loss")
        labels = []
        for start, metrics in runs.items():
            curves = [run.curve("total_loss") for run in metrics]
            draw_seeds(panels[2], curves, COLORS[start])
            if any(curves):
                labels.append((mean_end(curves), LABELS[start], COLORS[start]))
        finish(panels[2], labels, number="{:.2f}")
        save(figure, path)


def draw_ap(axes: Axes, runs: Mapping[str, Sequence[Metrics]], metric: str) -> None:
    """One AP of both starts against iteration: a thin line a seed, a thick one for the mean."""
    axes.set_title(f"{METRICS[metric]} on held-out images")
    labels = []
    for start, metrics in runs.items():
        curves = [run.evaluated(metric) for run in metrics]
        draw_seeds(axes, curves, COLORS[start], marker="o")
        labels.append((mean_end(curves), LABELS[start], COLORS[start]))
    finish(axes, labels, number="{:.1f}", least_height=1.0)


def draw_captions(path: Path, annotations: Path, images: Path, count: int = 4) -> None:
    """The first captioned images, each with two of its captions: what pretraining sees."""
    coco = read_json(annotations)
    captions: dict[int, list[str]] = {}
    for item in coco["annotations"]:
        captions.setdefault(item["image_id"], []).append(item["caption"])
    records = coco["images"][:count]
    texts = [
        "\n".join(textwrap.fill(f"“{text}”", 40) for text in captions.get(record["id"], [])[:2])
        for record in records
    ]
    lines = max(text.count("\n") for text in texts) + 1
    side, below = 9.6 / count, 0.12 + 0.155 * lines  # inches
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, side + below))
        panels = figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
        figure.subplots_adjust(left=0, right=1, top=1, bottom=below / (side + below))
        for axes, record, text in zip(panels, records, texts):
            show_image(axes, read_pixels(images / record["file_name"]))
            axes.text(
                *(0, -0.04, text),
                transform=axes.transAxes,
                va="top",
                fontsize=7.5,
                linespacing=1.4,
            )
        save(figure, path, photographs=True)


def draw_masks(path: Path, pictures: Sequence[Picture], columns: int = 4) -> None:
    """Held-out images in columns: the truth, then each start's predictions below it."""
    bands = -(-len(pictures) // columns)
    rows = ["truth", "random", "pretrained"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.36 * len(rows) * bands + 0.12 * (bands - 1)))
        grid = figure.subfigures(bands, 1, hspace=0.02, squeeze=False)[:, 0]
        for band, part in enumerate(grid):
            panels = part.subplots(
                len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03}
            )
            part.subplots_adjust(left=0.028, right=0.998, top=0.995, bottom=0.005)
            shown = pictures[band * columns : (band + 1) * columns]
            _fill_band(panels, rows, shown)
        save(figure, path, photographs=True, palette=256, colors=tuple(COLORS.values()))


def draw_overview(
    path: Path, runs: Mapping[str, Sequence[Metrics]], pictures: Sequence[Picture]
) -> None:
    """One picture of the whole: mask AP against iteration beside predicted masks. For a README."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.4))
        left, right = figure.subfigures(1, 2, width_ratios=(0.37, 0.63))
        axes = left.subplots()
        left.subplots_adjust(left=0.08, right=0.68, top=0.91, bottom=0.12)
        draw_ap(axes, runs, "segm/AP")
        rows = ["truth", "random", "pretrained"]
        panels = right.subplots(3, 4, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        right.subplots_adjust(left=0.04, right=0.995, top=0.985, bottom=0.015)
        _fill_band(panels, rows, pictures[:4], fontsize=5.5, scores=False)
        save(figure, path, photographs=True, palette=96, colors=tuple(COLORS.values()))


def _fill_band(
    panels: np.ndarray,
    rows: Sequence[str],
    pictures: Sequence[Picture],
    fontsize: float = 6.5,
    scores: bool = True,
) -> None:
    for row, kind in zip(panels, rows):
        row[0].text(
            -0.035,
            0.5,
            LABELS[kind],
            transform=row[0].transAxes,
            rotation=90,
            ha="right",
            va="center",
            color=COLORS[kind],
            fontweight="bold",
            fontsize=8.5,
        )
        for axes in row:
            axes.set_axis_off()
        for axes, picture in zip(row, pictures):
            show_image(axes, picture.image)
            for instance in picture.truth if kind == "truth" else picture.predictions[kind]:
                text = instance.name
                if scores and instance.score is not None:
                    text += f" {instance.score:.2f}"
                _draw_instance(axes, instance, text, COLORS[kind], fontsize)


def _draw_instance(axes: Axes, instance: Instance, text: str, color: str, fontsize: float) -> None:
    """Right ones have a solid outline, and are filled where predicted; wrong ones a dashed one."""
    if not instance.mask.any():
        return
    smooth = np.pad(instance.mask.astype(float), 1)
    height, width = instance.mask.shape
    grid = np.arange(-1, width + 1), np.arange(-1, height + 1)
    if instance.right and instance.score is not None:
        axes.contourf(*grid, smooth, levels=[0.5, 2], colors=[color], alpha=0.42)
    halo = [withStroke(linewidth=2.6, foreground="white")]
    axes.contour(
        *grid,
        smooth,
        levels=[0.5],
        colors=[color],
        linewidths=1.3,
        linestyles="solid" if instance.right else "dashed",
    ).set(path_effects=halo)
    ys, xs = np.nonzero(instance.mask)
    # half the label's width, as a share of the picture's
    margin = 0.31 * fontsize * len(text) / (axes.get_window_extent().width / axes.figure.dpi * 72)
    axes.text(
        np.clip(xs.mean(), margin * width, (1 - margin) * width),
        max(ys.min(), 0.05 * height),
        text,
        ha="center",
        va="center",
        fontsize=fontsize,
        color="white" if instance.right else color,
        bbox={
            "boxstyle": "round,pad=0.18",
            "fc": color if instance.right else "white",
            "ec": color,
            "lw": 0.6,
            "alpha": 0.92,
        },
        clip_on=True,
    )
