"""The finished demo: its pictures, and a report that stands alone and says what was measured."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from virtex_d2.studies.demo import figures
from virtex_d2.studies.demo.main import run_demo
from virtex_d2.studies.reporting import plots


@pytest.fixture(scope="session")
def html(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


def final(finished, seed, start, metric):
    lines = (finished / "runs" / f"seed{seed}" / start / "metrics.json").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines if metric in line][-1]


def test_the_report_needs_nothing_but_itself(html):
    assert not re.search(r'(src|href)="(?!data:)', html)
    text = re.sub(r"base64,[^\"]+", "", html)
    for reference in ("http", "<script", "@import", "url("):
        assert reference not in text


def test_the_reports_pictures_are_those_beside_it(finished, html):
    embedded = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", html)]
    beside = {path.read_bytes() for path in finished.glob("*.png")}
    assert len(embedded) == 4
    assert set(embedded) <= beside
    for data in embedded:
        assert Image.open(io.BytesIO(data)).size[0] >= 1000


def test_the_table_has_the_means_of_what_the_runs_recorded(finished, html):
    for metric in ("bbox/AP", "segm/AP50"):
        for start in ("random", "pretrained"):
            mean = np.mean([final(finished, seed, start, metric) for seed in (1, 2)])
            assert f'<td class="n">{mean:.1f} ±' in html


def test_the_report_says_what_ran_on_what(finished, html):
    for words in ("600 captioned images", "20 iterations of 32", "10 iterations of 4", "Seed 2:"):
        assert words in html
    assert re.search(r"torch \d", html)
    assert re.search(r"\d+ cores usable", html)
    assert "<dt>Trained on</dt><dd>cpu</dd>" in html


def test_the_report_has_every_command_as_it_was_run(finished, html):
    for marker in (finished / "stages").glob("*.json"):
        command = json.loads(marker.read_text())["command"]
        assert command.split()[1] in html
        assert "--resume" not in command
    assert html.count("<pre>") == len(list((finished / "stages").glob("*.json"))) == 9


def test_a_pretraining_that_does_not_help_is_reported_as_such(project, capsys):
    script = project / "tools" / "train_net.py"
    script.write_text(script.read_text().replace("32 if better else 21", "11 if better else 21"))
    path = run_demo(project, project / "demo", scale=0.1)
    text = path.read_text(encoding="utf-8")
    assert "the caption-pretrained start is 10.0 points behind" in text
    assert "ahead" not in text.replace("nothing is ahead", "")
    assert "behind" in capsys.readouterr().out


def test_labels_that_would_overlap_are_pushed_apart():
    figure = figures.Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([0, 10], [0, 50])
    plots.finish(axes, [(40.0, "random", "k"), (40.5, "caption-pretrained", "k")])
    figure.canvas.draw()
    lower, upper = (text.get_window_extent() for text in axes.texts)
    assert lower.y1 <= upper.y0
    assert upper.y0 - lower.y1 < 20


def test_the_two_starts_differ_in_brightness_too():
    # so that they are told apart in a grey print, and by people who see no colours
    def luminance(color):
        return np.dot([int(color[i : i + 2], 16) for i in (1, 3, 5)], (0.299, 0.587, 0.114))

    assert abs(luminance(figures.COLORS["random"]) - luminance(figures.COLORS["pretrained"])) > 25


def test_a_picture_with_a_palette_keeps_the_starts_colours(finished):
    colors = {tuple(map(int, pixel)) for pixel in _pixels(finished / "masks.png")}
    for start in ("random", "pretrained"):
        code = figures.COLORS[start]
        assert tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) in colors


def _pixels(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
