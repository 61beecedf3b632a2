"""What a run has recorded in metrics.json, as curves, and how they are drawn.

One colour is one start, lines carry their own labels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.integrate import trapezoid

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import json_lines

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
WIDTH = 9.6  # inches, 1000 pixels of a page
DPI, PHOTO_DPI = 200, 150  # about twice that


Curve = Mapping[int, float]  # values by iterations done (1 after the first), ascending


class Metrics:
    """A run's metrics.json.

    Args:
        path: of JSON lines, each with "iteration", as detectron2's JSONWriter writes them.
        iterations: the run's length: what is recorded after the last iteration belongs to it.
    """

    def __init__(self, path: Path, iterations: int):
        self.path = path
        self._iterations = iterations
        self._records = _read_records(path)

    @property
    def keys(self) -> list[str]:
        """Everything that was recorded, in the order of its first time."""
        return list(dict.fromkeys(key for record in self._records for key in record))

    @property
    def training_seconds(self) -> float:
        """Add up all iterations, without what came between them; 0 where `time` is not recorded.

        The recorded time is the median of the iterations since the record before.
        """
        curve = self.curve("time")
        return sum(
            seconds * (end - start) for start, (end, seconds) in zip((0, *curve), curve.items())
        )

    def curve(self, key: str) -> Curve:
        """Give a number's course; empty where it was never recorded.

        What a resumed run recorded replaces what the stopped one had of the same iteration.
        """
        points = {
            min(record["iteration"] + 1, self._iterations): float(record[key])
            for record in self._records
            if key in record
        }
        return dict(sorted(points.items()))


def area(curve: Curve) -> float:
    """Average a result over a run: the area under its curve, from 0 before the first iteration.

    Straight lines join the evaluations. It counts how early a result comes, and holds more of them
    than the last one alone, so that single runs scatter less in it.

    Args:
        curve: with a point after the last iteration.

    Returns:
        In the result's unit; NaN for an empty curve.
    """
    if not curve:
        return math.nan
    iterations, values = [0, *curve], [0.0, *curve.values()]
    return float(trapezoid(values, iterations)) / iterations[-1]


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        records = [record for record in json_lines(path) if "iteration" in record]
    except OSError as error:
        raise InputError(f"{path}: cannot read the run's metrics: {error.strerror}.") from error
    if not records:
        raise InputError(f"{path}: expected JSON lines with an iteration each, found none.")
    return records


def draw_seeds(axes: Axes, curves: Sequence[Curve], color: str, marker: str = "") -> float | None:
    """Draw a thin line for each seed and a thick one for their mean, where all have a value.

    Returns:
        The mean of what the curves end with; None where none has a point.
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    for curve in curves if len(curves) > 1 else ():
        axes.plot(*zip(*curve.items()), color=color, lw=0.8, alpha=0.4, clip_on=False)
    shared = sorted(set.intersection(*map(set, curves)))
    means = [float(np.mean([curve[i] for curve in curves])) for i in shared]
    marker = marker if len(means) > 1 else "o"
    axes.plot(shared, means, color=color, lw=2.2, marker=marker, ms=4, zorder=3, clip_on=False)
    return float(np.mean([[*curve.values()][-1] for curve in curves]))


def finish(
    axes: Axes,
    labels: list[tuple[float, str, Any]],
    number: str = "{:.2f}",
    least_height: float = 0.0,
) -> None:
    """Begin the axes at zero, and label each line at its end, apart from its neighbours.

    Args:
        labels: (value at the end, text, colour); the value is put below a text of one line.
    """
    axes.set_xlabel("iteration")
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    high = max(1.04 * axes.get_ylim()[1], least_height)
    axes.set_ylim(0, high)
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    labels = sorted(labels, key=lambda label: label[0])
    places = _spread([value for value, _, _ in labels], gap=25 * high / points, highest=high)
    for (value, name, color), place in zip(labels, places):
        axes.annotate(
            name if "\n" in name else f"{name}\n{number.format(value)}",
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
    """Find places near the ascending `values`, at least `gap` apart, none above `highest`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    for index in reversed(range(len(places))):
        limit = places[index + 1] - gap if index + 1 < len(places) else highest
        places[index] = min(places[index], limit)
    return places


def save(figure: Figure, path: Path, photographs: bool = False) -> None:
    """Write the PNG; one of photographs without its margins."""
    how = {"dpi": min(DPI, PHOTO_DPI), "bbox_inches": "tight", "pad_inches": 0.02}
    figure.savefig(path, facecolor="white", **(how if photographs else {"dpi": DPI}))
