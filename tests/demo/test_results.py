"""Numbers out of the runs' files, and what is said about them."""

import json
import statistics

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.demo.results import Comparison, Metrics, compare, table, verdict


def metrics(tmp_path, *lines, iterations=10):
    path = tmp_path / "metrics.json"
    path.write_text("".join(f"{line}\n" for line in lines))
    return Metrics(path, iterations)


def test_a_curve_counts_iterations_that_are_done(tmp_path):
    # The last evaluation is recorded after the last iteration, under its successor's number.
    run = metrics(
        tmp_path, '{"iteration": 4, "bbox/AP": 1.5}', '{"iteration": 10, "bbox/AP": 3.0, "lr": 1}'
    )
    curve = run.curve("bbox/AP")
    assert curve.iterations == (5, 10)
    assert curve.values == (1.5, 3.0)
    assert curve.last == 3.0


def test_a_resumed_run_replaces_what_the_stopped_one_recorded(tmp_path):
    run = metrics(
        tmp_path,
        '{"iteration": 1, "total_loss": 9}',
        '{"iteration": 5, "total_loss": 8}',
        '{"iteration": 3, "total_loss": 7}',
        '{"iteration": 5, "total_loss": 6}',
    )
    assert run.curve("total_loss").iterations == (2, 4, 6)
    assert run.curve("total_loss").values == (9, 7, 6)


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    run = metrics(tmp_path, '{"iteration": 1, "lr": 0.5}', '{"iteration": 2, "l')
    assert run.curve("lr").iterations == (2,)


def test_a_run_without_an_evaluation_is_an_error_and_not_a_zero(tmp_path):
    run = metrics(tmp_path, '{"iteration": 10, "total_loss": 1}')
    with pytest.raises(InputError, match=r"metrics\.json: expected bbox/AP"):
        compare([run], [run])


def test_missing_and_empty_metrics_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Metrics(tmp_path / "metrics.json", 10)
    with pytest.raises(InputError, match="found none"):
        metrics(tmp_path, "rubbish", json.dumps([1]))


def test_differences_are_paired_by_seed():
    row = Comparison("bbox/AP", random=(10.0, 20.0, 30.0), pretrained=(13.0, 22.0, 34.0))
    assert row.differences == (3.0, 2.0, 4.0)
    assert row.lead == 3.0
    assert row.spread == pytest.approx(statistics.stdev((13, 22, 34)))
    assert not row.separated
    assert table([row]) == [("Box AP", "20.0 ± 10.0", "23.0 ± 10.5", "+3.0 ± 1.0")]


def test_one_seed_has_no_spread():
    row = Comparison("segm/AP", random=(10.0,), pretrained=(12.5,))
    assert row.spread is None
    assert table([row]) == [("Mask AP", "10.0", "12.5", "+2.5")]
    assert verdict(row) == (
        "Mask AP: the caption-pretrained start is 2.5 points ahead "
        "(one seed: nothing is known about the spread)."
    )


@pytest.mark.parametrize(
    ("random", "pretrained", "said"),
    [
        ((10.0, 11.0), (20.0, 21.0), ["10.0 points ahead", ", more than", "2 of 2", "worst seed"]),
        ((10.0, 14.0), (11.0, 15.0), ["1.0 points ahead", "no more than", "2 of 2"]),
        ((20.0, 21.0), (10.0, 11.0), ["10.0 points behind", "0 of 2"]),
        ((10.0, 11.0), (11.0, 10.0), ["no difference", "no more than", "1 of 2"]),
    ],
)
def test_the_verdict_follows_the_numbers(random, pretrained, said):
    sentence = verdict(Comparison("bbox/AP", random, pretrained))
    for words in said:
        assert words in sentence
    assert ("worst seed" in sentence) == ("worst seed" in said)
