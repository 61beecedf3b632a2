"""What the runs left -> a table over seeds."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.reporting.metrics import Metrics, mean_and_spread

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
            tuple(run.evaluated(metric).last for run in random),
            tuple(run.evaluated(metric).last for run in pretrained),
        )
        for metric in metrics
    ]


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
    """The COCO-format predictions of a detector's last evaluation."""
    found = sorted((run / "inference").rglob("coco_instances_results.json"))
    if len(found) != 1:
        raise InputError(
            f"{run / 'inference'}: expected one coco_instances_results.json, found {len(found)}."
        )
    return found[0]
