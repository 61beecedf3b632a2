"""Means, paired differences, and how far noise alone would carry them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as students_t

CONFIDENCE = 0.95  # of the intervals


@dataclass(frozen=True)
class Summary:
    """Values of several seeds.

    Attributes:
        values: by seed; NaN left out.
        mean: NaN where there is no value.
        deviation: sample standard deviation; None for fewer than two.
    """

    values: Mapping[int, float]
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """One start minus another over the seeds that both have.

    Attributes:
        values: the difference of each seed.
        mean: of them; NaN where there is none.
        interval: `CONFIDENCE` interval of the mean, by Student's t with n - 1 degrees of freedom:
            it takes the seeds' differences for independent and normal. None for fewer than two.
    """

    values: Mapping[int, float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def ahead(self) -> int:
        """In how many seeds the first start is better."""
        return sum(value > 0 for value in self.values.values())


def summarise(values: Mapping[int, float]) -> Summary:
    """Mean and spread of a number by seed; NaN (nothing to measure) is left out."""
    known = {seed: value for seed, value in values.items() if not math.isnan(value)}
    return Summary(known, _mean(list(known.values())), _deviation(list(known.values())))


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """`values` minus `baseline`, paired by seed: the two share order, augmentation and images."""
    paired = {
        seed: value - baseline[seed]
        for seed, value in values.items()
        if seed in baseline and not math.isnan(value - baseline[seed])
    }
    found = list(paired.values())
    mean, deviation = _mean(found), _deviation(found)
    interval = None
    if deviation is not None:
        quantile = students_t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)
        reach = float(quantile) * deviation / math.sqrt(len(found))
        interval = (mean - reach, mean + reach)
    return Difference(paired, mean, interval)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
