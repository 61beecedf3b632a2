"""Means, paired differences and intervals, against what is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.studies.compare.tables import difference, sample

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
