"""The measurement of the verdict's error rates: what it plants, draws and counts."""

import numpy as np
import pytest
import torch

from benchmarks import verdict_errors
from benchmarks.verdict_errors import BASELINE, NULL, resample, scrambled, simulate
from virtex_d2.studies.verdict import HELPS, HURTS, UNDECIDED


@pytest.fixture
def values():
    """Eight seeds of each start; all runs have different figures."""
    rng = np.random.default_rng(0)
    means = {BASELINE: 20.0, "good": 30.0, "harmful": 10.0}
    found = {start: {s: m + rng.normal() for s in range(1, 9)} for start, m in means.items()}
    return {**found, NULL: {100 + seed: 20 + rng.normal() for seed in range(1, 9)}}


def test_scrambled_tensors_hold_the_same_numbers_elsewhere_and_last_scales_are_zero():
    tensors = {
        "layer1.0.conv1.weight": torch.randn(4, 3, 3, 3),
        "layer1.0.bn1.weight": torch.rand(4),
        "layer1.0.bn2.weight": torch.rand(4),
        "bn1.weight": torch.rand(8),
    }
    made, metadata = scrambled(tensors, {"a": "b"})
    assert metadata == {"a": "b"}
    assert made["layer1.0.bn2.weight"].tolist() == [0] * 4
    for name in tensors.keys() - {"layer1.0.bn2.weight"}:
        assert made[name].shape == tensors[name].shape
        assert torch.equal(made[name].flatten().sort()[0], tensors[name].flatten().sort()[0])
    assert not torch.equal(made["layer1.0.conv1.weight"], tensors["layer1.0.conv1.weight"])


@pytest.mark.parametrize("draw", [resample, simulate])
def test_what_is_planted_is_found(values, draw):
    rng = np.random.default_rng(1)
    words = [draw(values, 5, rng) for _ in range(60)]
    assert {each["good"] for each in words} == {HELPS}
    assert {each["harmful"] for each in words} == {HURTS}
    assert sum(each[NULL] != UNDECIDED for each in words) <= 8


def test_no_run_is_drawn_twice_in_a_repeat(values, monkeypatch):
    judged = []
    monkeypatch.setattr(verdict_errors, "_words_of", judged.append)
    rng = np.random.default_rng(2)
    for _ in range(50):
        resample(values, 5, rng)
    runs = {**values[BASELINE], **values[NULL]}
    for drawn in judged:
        assert drawn["good"].values.keys() == drawn[NULL].values.keys()
        baseline = [values[BASELINE][seed] for seed in drawn["good"].values]
        null = [values[BASELINE][seed] + d for seed, d in drawn[NULL].values.items()]
        used = {
            next(seed for seed, value in runs.items() if value == pytest.approx(one, abs=1e-9))
            for one in [*baseline, *null]
        }
        assert len(used) == 10


def test_a_rate_counts_families_and_not_starts():
    rng = np.random.default_rng(3)
    normal, skewed = (
        verdict_errors.null_rate(verdict_errors.DISTRIBUTIONS[name], 3, 5, 300, rng)
        for name in ("normal", "exponential against a constant")
    )
    assert normal < 0.1 < skewed < 0.4
