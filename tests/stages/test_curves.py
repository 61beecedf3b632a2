"""Numbers out of a run's metrics.json, and labels that can be read."""

import json

import pytest
from matplotlib.figure import Figure

from virtex_d2.engine.errors import InputError
from virtex_d2.studies import curves
from virtex_d2.studies.curves import Metrics


def metrics(tmp_path, *lines, iterations=10):
    path = tmp_path / "metrics.json"
    path.write_text("".join(f"{line}\n" for line in lines))
    return Metrics(path, iterations)


def test_a_curve_counts_iterations_that_are_done(tmp_path):
    # The last evaluation is recorded after the last iteration, under its successor's number.
    run = metrics(
        tmp_path, '{"iteration": 4, "bbox/AP": 1.5}', '{"iteration": 10, "bbox/AP": 3.0, "lr": 1}'
    )
    assert run.curve("bbox/AP") == {5: 1.5, 10: 3.0}
    assert run.curve("segm/AP") == {}


def test_a_resumed_run_replaces_what_the_stopped_one_recorded(tmp_path):
    records = ((1, 9), (5, 8), (3, 7), (5, 6))
    lines = [json.dumps({"iteration": i, "total_loss": loss}) for i, loss in records]
    curve = metrics(tmp_path, *lines).curve("total_loss")
    assert list(curve.items()) == [(2, 9), (4, 7), (6, 6)]


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    run = metrics(tmp_path, '{"iteration": 1, "lr": 0.5}', '{"iteration": 2, "l')
    assert run.curve("lr") == {2: 0.5}


def test_missing_and_empty_metrics_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Metrics(tmp_path / "metrics.json", 10)
    with pytest.raises(InputError, match="found none"):
        metrics(tmp_path, "rubbish", json.dumps([1]))


def test_labels_that_would_overlap_are_pushed_apart():
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([0, 10], [0, 50])
    curves.finish(axes, [(40.0, "random", "k"), (40.5, "caption-pretrained", "k")])
    figure.canvas.draw()
    lower, upper = (text.get_window_extent() for text in axes.texts)
    assert lower.y1 <= upper.y0
    assert upper.y0 - lower.y1 < 20
