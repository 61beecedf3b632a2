"""Means, paired differences, intervals and verdicts, against what is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.studies.verdict import (
    FALSE_CLAIMS,
    HELPS,
    HURTS,
    POWER,
    UNDECIDED,
    Sample,
    difference,
    judge,
    sample,
    visible,
)

VALUES = st.dictionaries(st.integers(0, 20), st.floats(-100, 100), min_size=1, max_size=10)


def test_the_interval_is_students():
    # mean 2, deviation 1, n = 3: 4.303 is the 97.5 % quantile with two degrees of freedom
    found = difference({1: 11, 2: 12, 3: 13}, {1: 10, 2: 10, 3: 10})
    assert found.mean == 2
    assert found.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert not found.decided
    assert found.ahead == 3


def test_a_difference_that_every_seed_agrees_on_is_decided():
    assert difference({1: 12.0, 2: 12.1, 3: 11.9}, {1: 10, 2: 10, 3: 10}).decided
    assert difference({1: 8.0, 2: 8.1, 3: 7.9}, {1: 10, 2: 10, 3: 10}).decided


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        shared = rng.normal(0, 3, 4)  # what a seed does to both starts drops out
        found = difference(dict(enumerate(shared + rng.normal(1, 1, 4))), dict(enumerate(shared)))
        held += found.interval[0] <= 1 <= found.interval[1]
    assert 0.93 < held / 2000 < 0.97


def test_only_seeds_of_both_are_paired_and_nan_is_left_out():
    found = difference({1: 5.0, 2: 7.0, 3: math.nan}, {2: 6.0, 3: 6.0, 4: 6.0})
    assert found.values == {2: 1.0}
    assert found.interval is None
    assert not found.decided


def test_nothing_to_measure_is_nan_and_not_zero():
    assert math.isnan(sample({1: math.nan}).mean)
    assert math.isnan(difference({1: 1.0}, {2: 1.0}).mean)
    assert sample({1: math.nan, 2: 4.0}).mean == 4.0


@given(VALUES, VALUES)
def test_exchanging_the_two_turns_the_difference_around(first, second):
    there, back = difference(first, second), difference(second, first)
    assert there.values.keys() == back.values.keys() == first.keys() & second.keys()
    if there.values:
        assert there.mean == pytest.approx(-back.mean)
    if there.interval:
        assert there.interval[0] <= there.mean <= there.interval[1]
        assert there.interval[0] == pytest.approx(-back.interval[1])


def seeds(*values: float) -> Sample:
    return sample(dict(enumerate(values)))


def test_each_start_is_judged_by_its_sign_and_spread():
    found = judge(
        {
            "good": seeds(3.0, 3.2, 2.9, 3.1),
            "harmful": seeds(-2.0, -2.1, -1.9, -2.2),
            "unclear": seeds(2.0, -1.0, 3.0, 0.5),
        }
    )
    assert {name: verdict.word for name, verdict in found.items()} == {
        "good": HELPS,
        "harmful": HURTS,
        "unclear": UNDECIDED,
    }
    assert all(verdict.family == 3 for verdict in found.values())


def test_what_is_decided_alone_may_not_be_in_a_family():
    # t = 3 with four degrees of freedom: p = 0.040 of both sides
    diff = sample({n: 3 / 5**0.5 + shift for n, shift in enumerate((-1, 1, -1, 1, 0))})
    assert diff.decided
    assert judge({"a": diff})["a"].word == HELPS
    assert judge({"a": diff, "b": Sample({})})["a"].word == UNDECIDED


def test_holms_later_steps_are_easier():
    # p of one side: 0.0146, which 0.05 / 4 refuses and, once the first is taken, 0.05 / 3 allows
    second = sample({n: 3.33 * (5 / 5**0.5) / 5 + s for n, s in enumerate((-1, 1, -1, 1, 0))})
    clear = seeds(9.0, 9.1, 8.9, 9.0, 9.2)
    assert judge({"a": second, "b": Sample({})})["a"].word == UNDECIDED
    assert judge({"a": second, "b": clear})["a"].word == HELPS


@pytest.mark.parametrize("values", [(), (5.0,), (5.0, 5.0, 5.0), (0.1 + 0.2, 0.3, 0.3), (0.0, 0.0)])
def test_without_a_spread_nothing_is_claimed(values):
    (verdict,) = judge({"a": seeds(*values)}).values()
    assert verdict.word == UNDECIDED
    assert math.isnan(verdict.smallest)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("heavy", [False, True])
def test_false_claims_stay_below_their_bound_over_the_family(count, heavy):
    """Three starts that are the first one under other names, and share its runs."""
    rng = np.random.default_rng(7)
    draw = (lambda size: rng.standard_t(2, size)) if heavy else rng.standard_normal
    false = 0
    for _ in range(1000):
        runs = draw((4, count))
        verdicts = judge({str(k): seeds(*(runs[k] - runs[0])) for k in (1, 2, 3)})
        false += any(verdict.word != UNDECIDED for verdict in verdicts.values())
    # three standard errors of 1 000 draws are 0.02
    assert false / 1000 < FALSE_CLAIMS + 0.02


def test_the_smallest_visible_difference_is_seen_with_its_chance():
    rng = np.random.default_rng(3)
    true = visible(1.0, 3)
    seen = [judge({"a": seeds(*rng.normal(true, 1, 3))})["a"].word == HELPS for _ in range(1000)]
    assert abs(np.mean(seen) - POWER) < 0.04
    assert visible(1.0, 3, family=4) > true


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8))
def test_exchanging_the_two_turns_the_verdict_around(values):
    (there,) = judge({"a": seeds(*values)}).values()
    (back,) = judge({"a": seeds(*(-value for value in values))}).values()
    opposite = {HELPS: HURTS, HURTS: HELPS, UNDECIDED: UNDECIDED}
    assert back.word == opposite[there.word]
    assert back.smallest == pytest.approx(there.smallest, nan_ok=True)
