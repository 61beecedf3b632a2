"""Curves in the project's style: one colour is one start, lines carry their own labels."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from virtex_d2.studies.reporting.metrics import Curve

INK, MUTED, RULE = "#202124", "#6B7075", "#DADCE0"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#EEEFF1",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
# Of curves and of photographs: 1000 pixels of a page take 9.6 inches, so about twice that.
DPI, PHOTO_DPI = 200, 150


def show_image(axes: Axes, image: np.ndarray) -> None:
    axes.set_axis_off()
    axes.imshow(image, interpolation="bicubic")
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def draw_seeds(axes: Axes, curves: Sequence[Curve], color: str, marker: str = "") -> None:
    curves = [curve for curve in curves if curve]
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*xy(curve), color=color, lw=0.8, alpha=0.4, clip_on=False)
    if curves:
        iterations, means = _mean_curve(curves)
        axes.plot(
            iterations,
            means,
            color=color,
            lw=2.2,
            marker=marker if len(means) > 1 else "o",
            ms=4,
            zorder=3,
            clip_on=False,
        )


def _mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Where all have a value."""
    by_iteration = [dict(zip(curve.iterations, curve.values)) for curve in curves]
    shared = sorted(set.intersection(*(set(values) for values in by_iteration)))
    return shared, [float(np.mean([values[i] for values in by_iteration])) for i in shared]


def mean_end(curves: Iterable[Curve]) -> float:
    return float(np.mean([curve.last for curve in curves if curve]))


def xy(curve: Curve) -> tuple[Sequence[int], Sequence[float]]:
    return curve.iterations, curve.values


def finish(
    axes: Axes,
    labels: list[tuple[float, str, Any]],
    number: str = "{:.2f}",
    least_height: float = 0.0,
) -> None:
    """Axes from zero, and each line's label at its end, pushed apart where they would meet."""
    axes.set_xlabel("iteration")
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    low, high = 0.0, max(1.04 * axes.get_ylim()[1], least_height)
    axes.set_ylim(low, high)
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = (high - low) * 25 / points  # two lines of a label
    labels = sorted(labels, key=lambda label: label[0])
    places = _spread([value for value, _, _ in labels], gap, highest=high)
    for (value, name, color), place in zip(labels, places):
        axes.annotate(
            f"{name}\n{number.format(value)}" if "\n" not in name else name,
            xy=(1, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _spread(values: Sequence[float], gap: float, highest: float) -> list[float]:
    """Places near the ascending `values`, at least `gap` apart, none above `highest`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    for index in reversed(range(len(places))):
        limit = places[index + 1] - gap if index + 1 < len(places) else highest
        places[index] = min(places[index], limit)
    return places


def save(
    figure: Figure,
    path: Path,
    photographs: bool = False,
    palette: int = 0,
    colors: Sequence[str] = (),
) -> None:
    """Write the PNG; with a palette of that many colours it takes a third of the space.

    `colors` and the text's are always in it, with the paler ones of smooth edges.
    """
    figure.savefig(path, dpi=PHOTO_DPI if photographs else DPI, facecolor="white")
    if palette:
        drawn = np.array([ImageColor.getrgb(color) for color in (*colors, INK, MUTED)])
        fixed = np.concatenate([drawn, (drawn + 255) // 2, [[255, 255, 255]]])
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        found = np.reshape(pixels.quantize(palette - len(fixed)).getpalette("RGB"), (-1, 3))
        # Pillow finds the nearest colour only nearly: none may be close to a fixed one.
        distances = np.linalg.norm(found[:, None] - fixed, axis=2).min(axis=1)
        reference = Image.new("P", (1, 1))
        reference.putpalette(np.concatenate([found[distances > 20], fixed]).flatten().tolist())
        small = pixels.quantize(palette=reference, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
