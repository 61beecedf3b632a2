"""What seeds can tell: paired differences, their intervals, and verdicts with bounded errors.

Several starts are compared with a first one by the mean of their paired differences over seeds.

How it is decided (`judge`). Three to eight seeds leave little power to many tests: with five, the
interval of one test reaches 2.8 standard errors, at a twelfth of the level 5.9. So each start is
judged by one measure, chosen before anything is run; all others are shown with intervals and claim
nothing. The family of m starts is bounded by Holm's procedure (Scandinavian Journal of Statistics
6, 1979, section 3), which holds for dependent tests, as these are: they share the first start's
runs. Its hypotheses are the 2m one-sided ones, "not ahead" and "not behind" of every start: a claim
in the wrong direction counts as false, too.

Each test is Student's, of the differences. Where both starts are the same under two names the
differences are symmetric around zero, whatever a run's distribution: then the test keeps its level
for normal ones, and errs less often for heavier tails (Efron, JASA 64, 1969). Where two starts'
means are the same but not their distributions, skewed differences of few seeds may err more often.
`benchmarks/verdict_errors.py` measures it.
"""

import functools
import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as students_t

CONFIDENCE = 0.95  # of the intervals
FALSE_CLAIMS = 0.05  # bound of the chance that a family of starts gets any false claim
POWER = 0.8  # chance with which the smallest visible difference is seen
HELPS, HURTS, UNDECIDED = "helps", "hurts", "cannot be told"

Name = TypeVar("Name", bound=Hashable)

_SAME = 1e-9  # spread, as a share of the values, below which they are the same number


@dataclass(frozen=True)
class Sample:
    """Values of several seeds, or one start's minus another's; NaN is left out.

    Attributes:
        values: by seed.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """The sample standard deviation; NaN for fewer than two values."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """The `CONFIDENCE` interval of the mean; None for fewer than two values.

        By Student's t with n - 1 degrees of freedom: it takes values for independent and normal.
        """
        count = len(self.values)
        if count < 2:
            return None
        quantile = float(students_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        reach = quantile * self.deviation / math.sqrt(count)
        return self.mean - reach, self.mean + reach

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def ahead(self) -> int:
        """In how many seeds a difference is positive."""
        return sum(value > 0 for value in self.values.values())

    @property
    def varies(self) -> bool:
        """Whether seeds differ at all: else they are one value, however many there are."""
        largest = max(map(abs, self.values.values()), default=0.0)
        return len(self.values) > 1 and self.deviation > _SAME * largest


def sample(values: Mapping[int, float]) -> Sample:
    """Leave NaN (nothing to measure) out."""
    return Sample({seed: value for seed, value in values.items() if not math.isnan(value)})


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Sample:
    """Subtract `baseline`, paired by seed: the two share order, augmentation and images."""
    shared = [seed for seed in values if seed in baseline]
    return sample({seed: values[seed] - baseline[seed] for seed in shared})


@dataclass(frozen=True)
class Verdict:
    """What may be claimed of a start.

    Attributes:
        word: `HELPS`, `HURTS` or `UNDECIDED`.
        difference: from the first start, of the measure that decides.
        family: starts that are judged together.
    """

    word: str
    difference: Sample
    family: int

    @property
    def smallest(self) -> float:
        """The difference that these seeds would have seen with a chance of `POWER`."""
        diff = self.difference
        return visible(diff.deviation, len(diff.values), self.family) if diff.varies else math.nan


def judge(differences: Mapping[Name, Sample]) -> dict[Name, Verdict]:
    """Judge starts by their differences from the first one; see the head of this file.

    The chance of any false claim among all of them is at most `FALSE_CLAIMS`.

    Args:
        differences: by start, all starts that are compared: also those without a value yet.
    """
    chances = {}
    for name, diff in differences.items():
        ahead = _chance(diff)
        chances |= {(name, HELPS): ahead, (name, HURTS): 1 - ahead}
    words = dict.fromkeys(differences, UNDECIDED)
    ranked = sorted(chances, key=chances.__getitem__)
    for place, (name, word) in enumerate(ranked):
        if chances[name, word] > FALSE_CLAIMS / (len(ranked) - place):
            break
        words[name] = word
    count = len(differences)
    return {name: Verdict(words[name], diff, count) for name, diff in differences.items()}


def _chance(diff: Sample) -> float:
    """The p-value of "not ahead": of so large a mean where the true one is zero."""
    if not diff.varies:  # a single run, or runs that no seed has changed: no spread to judge by
        return 0.5
    error = diff.deviation / math.sqrt(len(diff.values))
    return float(students_t.sf(diff.mean / error, len(diff.values) - 1))


def visible(deviation: float, count: int, family: int = 1) -> float:
    """Find the true difference that so many seeds see with a chance of `POWER`.

    By the noncentral t distribution, for normal differences (Cohen, Statistical Power Analysis,
    1988, chapter 2), at the level of the first of Holm's steps.

    Args:
        deviation: of paired differences. That of few seeds is rough: of five often by a third.
        count: pairs, at least two.
        family: starts that are judged together.

    Returns:
        In the unit of the deviation.
    """
    return _shift(count, family) * deviation / math.sqrt(count)


@functools.cache
def _shift(count: int, family: int) -> float:
    """`visible` in standard errors."""
    bound = float(students_t.isf(FALSE_CLAIMS / (2 * family), count - 1))
    # far above the bound the power is 1
    return brentq(lambda shift: POWER - float(nct.sf(bound, count - 1, shift)), 0, 5 * bound + 5)
