"""The demo from beginning to end: with stand-ins for its tools, and the real line once."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import open_page
from virtex_d2.engine.errors import InputError
from virtex_d2.studies import curves
from virtex_d2.studies.demo import main
from virtex_d2.studies.demo.line import run_demo
from virtex_d2.studies.stages import StageFailedError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def html(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished demo in a project of its own, to be changed."""
    monkeypatch.setattr(curves, "DPI", 30)  # nobody looks at the pictures
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "demo"


def logs(output: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (output / "logs").iterdir()}


def final(finished, seed, start, metric):
    lines = (finished / "runs" / f"seed{seed}" / start / "metrics.json").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines if metric in line][-1]


def test_the_page_opens_without_a_network_and_without_an_error(finished):
    page = open_page(finished / "report.html")
    assert (page.console, page.requests) == ([], [])
    assert page.title == "From captions to a detector"
    # differences, curves, classes, predictions, captions, pretraining
    assert len(page.images) == 6
    assert all(image.loaded and image.alt and 400 < image.shown <= 1000 for image in page.images)
    assert "Mask AP: caption-pretrained is" in page.text
    assert "No pictures" not in page.text


def test_the_pages_pictures_are_those_beside_it(finished, html):
    embedded = {base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", html)}
    assert embedded == {path.read_bytes() for path in (finished / "pictures").glob("*.png")}
    with Image.open(finished / "overview.png") as image:
        assert image.width > 1000


def test_the_table_has_the_means_of_what_the_runs_recorded(finished, html):
    for metric in ("bbox/AP", "segm/AP50"):
        for start in ("random", "pretrained"):
            mean = np.mean([final(finished, seed, start, metric) for seed in (1, 2)])
            assert f'<td class="n">{mean:.1f} ±' in html


def test_the_page_says_what_ran_on_what(finished, html):
    for words in ("600 captioned images", "20 iterations of 32", "10 iterations of 4", "1, 2. A"):
        assert words in html
    assert re.search(r"torch \d", html)
    assert re.search(r"\d+ cores usable", html)
    assert "<dt>Trained on</dt><dd>cpu</dd>" in html
    markers = list((finished / "stages").glob("*.json"))
    assert html.count("<pre>OMP_NUM_THREADS=") == len(markers) == 9
    assert "--resume" not in html


def test_complete_stages_are_kept_and_the_report_is_made_anew(finished_copy, capsys):
    before = logs(finished_copy)
    (finished_copy / "overview.png").unlink()
    run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=2)
    assert logs(finished_copy) == before
    told = capsys.readouterr().out
    assert told.count("done before") == 9
    assert re.search(r"^caption-pretrained +\d+\.\d ± ", told, re.MULTILINE)
    assert re.search(r"^Box AP: caption-pretrained is .* ahead of random over 2 seeds", told, re.M)
    assert (finished_copy / "overview.png").is_file()


def test_a_pretraining_that_does_not_help_is_reported_as_such(finished_copy, capsys):
    for path in finished_copy.glob("runs/*/pretrained/metrics.json"):
        path.write_text(re.sub(r'"(\w+/AP\d*)": [\d.]+', r'"\1": 10.0', path.read_text()))
    run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=2)
    assert re.search(r"caption-pretrained is [\d.]+ points behind random", capsys.readouterr().out)


def test_a_failed_stage_ends_the_demo_without_a_report(finished_copy):
    # Seed 3 is new, and its tool finds something that makes it fail.
    trap = finished_copy / "runs" / "seed3" / "pretrain" / "fail"
    trap.parent.mkdir(parents=True)
    trap.touch()
    before = logs(finished_copy)
    with pytest.raises(StageFailedError, match="seed3-pretrain ended with exit code 1"):
        run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=3)
    assert not (finished_copy / "report.html").exists()
    after = logs(finished_copy)
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {"seed3-pretrain"}


def test_an_output_folder_of_another_scale_is_refused(finished):
    before = sorted(finished.rglob("*"))
    with pytest.raises(InputError, match=r"scale 0\.1; now scale 1"):
        run_demo(finished.parent, finished, scale=1)
    assert sorted(finished.rglob("*")) == before


def test_an_output_folder_with_something_else_in_it_is_refused(project):
    (project / "demo").mkdir()
    (project / "demo" / "thesis.tex").touch()
    with pytest.raises(InputError, match="no demo has left there"):
        run_demo(project, project / "demo")
    assert [path.name for path in (project / "demo").iterdir()] == ["thesis.tex"]


def test_the_tool_takes_its_scale_from_the_environment_and_reports_a_failed_stage(
    project, monkeypatch, capsys
):
    (project / "tools" / "make_shapes.py").write_text("raise SystemExit('no shapes today')")
    monkeypatch.chdir(project)
    monkeypatch.setenv("DEMO_SCALE", "0.05")
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit) as caught:
        main.main(project)
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the stage world-captions ended with exit code 1")
    assert "no shapes today" in told
    assert json.loads((project / "demo" / "demo.json").read_text()) == {"scale": 0.05}


@pytest.mark.slow
def test_the_whole_line_runs_from_captions_to_a_report(tmp_path, run_python):
    output = tmp_path / "demo"
    result = run_python(
        ROOT / "tools" / "demo.py", "--output", output, "--scale", 0.005, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (output / "runs" / "seed1" / "pretrain" / "backbone.safetensors").is_file()
    for run, starts_from_captions in (("random", False), ("pretrained", True)):
        log = (output / "runs" / "seed1" / run / "log.txt").read_text()
        assert bool(re.search(r"265 of 265 backbone tensors set", log)) == starts_from_captions
        lines = (output / "runs" / "seed1" / run / "metrics.json").read_text().splitlines()
        assert any("segm/AP" in json.loads(line) for line in lines)
    for picture in (output / "overview.png", *output.glob("pictures/*.png")):
        with Image.open(picture) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 10
    assert (output / "overview.png").stat().st_size < 300_000
    assert re.search(r"^Mask AP: ", result.stdout, re.MULTILINE)
