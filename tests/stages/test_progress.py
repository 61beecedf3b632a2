"""The progress line of one process and of several."""

import io

import pytest

from virtex_d2.studies.pipeline.progress import Progress, clock


@pytest.fixture
def progress(monkeypatch):
    """Makes one that writes at every line, and gives what it has written."""
    out = io.StringIO()

    def make(**iterations):
        made = Progress(iterations or {"": 0}, out)
        monkeypatch.setattr(made, "_period", 0)
        return made, out

    return make


def test_iteration_loss_and_remaining_time_are_shown(progress):
    line, out = progress(random=200)
    line.update(
        "[11/21 05:50:53 d2.utils.events]:  eta: 0:01:40  iter: 99  total_loss: 3.14159  lr: 1",
        "random",
    )
    assert out.getvalue() == "  0:00 · iteration 100 of 200 · loss 3.142 · 0:01:40 to go\n"


def test_a_process_that_says_nothing_is_shown_as_running(progress):
    line, out = progress()
    line.show()
    line.update("[11/21 05:50:53 detectron2]: Loading the images")
    line.show()
    assert out.getvalue().splitlines() == [
        "  0:00 · running",
        "  0:00 · Loading the images",
        "  0:00 · Loading the images",
    ]


def test_of_a_training_only_log_lines_are_shown(progress):
    line, out = progress(random=10)
    line.update("[11/21 05:50:53 d2.evaluation]: Inference done 11/48.", "random")
    line.update("UserWarning: some library's worry", "random")
    assert out.getvalue().splitlines() == ["  0:00 · Inference done 11/48."] * 2


def test_processes_that_run_at_once_share_a_line(progress):
    line, out = progress(random=200, pretrained=200)
    line.update("[11/21 05:50:53 d2]:  eta: 0:01:40  iter: 99", "random")
    line.end("random")
    line.update("[11/21 05:50:53 d2]:  eta: 0:00:30  iter: 149", "pretrained")
    assert out.getvalue().splitlines() == [
        "  0:00 · random: iteration 100 of 200 · 0:01:40 to go | pretrained: running",
        "  0:00 · random: finished | pretrained: iteration 150 of 200 · 0:00:30 to go",
    ]


def test_a_line_now_and_then_where_there_is_no_terminal():
    out = io.StringIO()
    Progress({"": 0}, out).update("first")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3600, "1:00:00"), (3599.6, "1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
