"""What the runs left -> numbers: curves of one run, and a table over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtex_d2.runtime.errors import InputError

# The table's rows; names as detectron2's COCOEvaluator writes them, values in percent.
METRICS = {
    "bbox/AP": "Box AP",
    "bbox/AP50": "Box AP50",
    "bbox/AP75": "Box AP75",
    "segm/AP": "Mask AP",
    "segm/AP50": "Mask AP50",
    "segm/AP75": "Mask AP75",
}
MAIN_METRICS = ("bbox/AP", "segm/AP")


@dataclass(frozen=True)
class Curve:
    """One number against iterations done (1 after the first)."""

    iterations: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def last(self) -> float:
        """The value at the end."""
        return self.values[-1]


class Metrics:
    """A run's metrics.json.

    Args:
        path: of JSON lines, each with "iteration", as detectron2's JSONWriter writes them.
        iterations: the run's length: what is recorded after the last iteration belongs to it.

    Raises:
        InputError: there is no such file, or nothing in it.
    """

    def __init__(self, path: Path, iterations: int):
        self.path = path
        self._iterations = iterations
        self._records = _read_records(path)

    def curve(self, key: str) -> Curve:
        """A number's course; empty where it was never recorded.

        What a resumed run recorded replaces what the stopped one had of the same iteration.
        """
        points = {
            min(record["iteration"] + 1, self._iterations): float(record[key])
            for record in self._records
            if key in record
        }
        ordered = sorted(points.items())
        return Curve(tuple(i for i, _ in ordered), tuple(value for _, value in ordered))

    def ap_curve(self, key: str) -> Curve:
        """As `curve`; NaN, which the evaluator gives where nothing was detected, becomes AP 0.

        Raises:
            InputError: the number was never recorded.
        """
        curve = self.curve(key)
        if not curve:
            raise InputError(f"{self.path}: expected {key} of an evaluation; there is none.")
        return Curve(curve.iterations, tuple(0.0 if math.isnan(v) else v for v in curve.values))


@dataclass(frozen=True)
class Comparison:
    """One metric of both starts over the seeds, in their order; percent.

    Attributes:
        random, pretrained: a value for each seed.
    """

    metric: str
    random: tuple[float, ...]
    pretrained: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """Pretrained minus random for each seed: the two share seed, images and length."""
        return tuple(p - r for p, r in zip(self.pretrained, self.random))

    @property
    def lead(self) -> float:
        """The mean difference."""
        return statistics.fmean(self.differences)

    @property
    def spread(self) -> float | None:
        """The larger of the two starts' standard deviations over seeds; None for one seed."""
        if len(self.random) < 2:
            return None
        return max(statistics.stdev(self.random), statistics.stdev(self.pretrained))

    @property
    def separated(self) -> bool:
        """Whether the worst pretrained seed is above the best random one."""
        return min(self.pretrained) > max(self.random)


def compare(
    random: Sequence[Metrics], pretrained: Sequence[Metrics], metrics: Iterable[str] = METRICS
) -> list[Comparison]:
    """The table: the last evaluation of every run."""
    return [
        Comparison(
            metric,
            tuple(run.ap_curve(metric).last for run in random),
            tuple(run.ap_curve(metric).last for run in pretrained),
        )
        for metric in metrics
    ]


def mean_and_spread(values: Sequence[float], signed: bool = False) -> str:
    """ "12.3 ± 0.4" (standard deviation), or "12.3" for one value."""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(comparisons: Iterable[Comparison]) -> list[tuple[str, str, str, str]]:
    """Rows of text: metric, random, caption-pretrained, difference."""
    return [
        (
            METRICS[row.metric],
            mean_and_spread(row.random),
            mean_and_spread(row.pretrained),
            mean_and_spread(row.differences, signed=True),
        )
        for row in comparisons
    ]


def verdict(row: Comparison) -> str:
    """What one metric says, in a sentence; as ready to say that pretraining did not help."""
    name, seeds = METRICS[row.metric], len(row.differences)
    if round(row.lead, 1) == 0:
        sentence = f"{name}: no difference between the two starts"
    else:
        sentence = (
            f"{name}: the caption-pretrained start is {abs(row.lead):.1f} points "
            f"{'ahead' if row.lead > 0 else 'behind'}"
        )
    if row.spread is None:
        return f"{sentence} (one seed: nothing is known about the spread)."
    ahead = sum(difference > 0 for difference in row.differences)
    size = "more" if abs(row.lead) > row.spread else "no more"
    return (
        f"{sentence} on average over {seeds} seeds, {size} than their standard deviation "
        f"({row.spread:.1f}); it is ahead in {ahead} of {seeds} seeds"
        + (", and its worst seed is above the best random one." if row.separated else ".")
    )


def find_predictions(run: Path) -> Path:
    """The COCO-format predictions of a detector's last evaluation.

    Raises:
        InputError: there are none, or of several data sets.
    """
    found = sorted((run / "inference").rglob("coco_instances_results.json"))
    if len(found) != 1:
        raise InputError(
            f"{run / 'inference'}: expected one coco_instances_results.json, found {len(found)}."
        )
    return found[0]


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON that can be read: {error}") from error


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the run's metrics: {error.strerror}.") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that was killed while it wrote
        if isinstance(record, dict) and "iteration" in record:
            records.append(record)
    if not records:
        raise InputError(f"{path}: expected JSON lines with an iteration each, found none.")
    return records
