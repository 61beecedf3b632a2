"""A comparison of real trainings, from the tool to the page in a browser."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser import open_page
from virtex_d2.engine.files import read_safetensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_detector, shapes_world, backbone_file, run_python):
    output = tmp_path_factory.mktemp("comparison") / "output"
    _, config, *opts = small_detector("FPN")
    data_sets = [
        [f"world_{split}", "coco", str(shapes_world / f"annotations/instances_{split}.json")]
        + [str(shapes_world / "images" / split)]
        for split in ("train", "test")
    ]
    opts = [
        *(word for pair in zip(opts[::2], opts[1::2]) if pair[0] != "SEED" for word in pair),
        *("VIRTEX.DATASETS", repr(data_sets), "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4),
        *("DATASETS.TRAIN", "('world_train',)", "DATASETS.TEST", "('world_test',)"),
    ]
    command = [
        *("tools/compare_inits.py", "--output", output, "--config-file", config),
        *("--preset", "quick", "--init", "random"),
        *("--init", f"other={backbone_file('resnet18')}"),
        *("--fractions", 0.5, "--seeds", 1, "--opts", *opts),
    ]
    result = run_python(*command, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    yield command, output
    shutil.rmtree(output)  # checkpoints


def test_the_page_opens_without_a_network_and_without_an_error(finished):
    _, output = finished
    page = open_page(output / "report.html")
    assert page.console == []
    assert page.requests == []
    assert page.title == "Which initialisation?"
    # differences, curves; classes and predictions of frozen backbones and of whole detectors
    assert len(page.images) == 6
    assert all(image.loaded and image.alt and 400 < image.shown <= 1000 for image in page.images)
    assert re.search("Box AP: (no difference of a tenth|other is [0-9.]+ points)", page.text)
    assert "No pictures" not in page.text
    assert "0.5" in (output / "results.csv").read_text()
    assert re.search(r"other: cannot be told\. Box AP over the run: .* 1 seed\.", page.text)


def test_a_frozen_backbone_stays_what_it_was_and_few_images_train_no_svm(finished):
    command, output = finished
    (weights,) = (word[len("other=") :] for word in map(str, command) if word.startswith("other="))
    start, _ = read_safetensors(weights)
    frozen, whole = (
        torch.load(
            next(output.glob(f"runs/*/*/{step}other/seed1/model_final.pth")), weights_only=False
        )["model"]
        for step in ("frozen/", "")
    )
    name = "backbone.bottom_up.res5.1.conv2.weight"
    assert torch.equal(torch.as_tensor(frozen[name]), start["layer4.1.conv2.weight"])
    assert not torch.equal(torch.as_tensor(whole[name]), start["layer4.1.conv2.weight"])
    html = (output / "report.html").read_text()
    assert "svm-50pct-other-seed1 is left out: none of 14 classes can be asked for; circle" in html
    assert "not finished" not in html


def test_predictions_are_drawn_beside_the_truth(finished):
    _, output = finished
    with Image.open(output / "pictures" / "predictions0.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert picture.width > 3 * 300
    assert pixels.std() > 20


def test_the_same_command_keeps_what_is_done(finished, run_python):
    command, output = finished
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/**/metrics.json")}
    assert len(before) == 4
    report = (output / "report.html").read_bytes()
    result = run_python(*command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done before") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (output / "report.html").read_bytes() == report


def test_without_the_images_the_report_says_why_it_has_no_pictures(
    finished, run_python, shapes_world, tmp_path
):
    _, output = finished
    collected = []
    for name in ("random", "other"):
        folder = next(output.glob(f"runs/*/*/{name}/seed1"))
        copied = tmp_path / name
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.pth"))
        config = (copied / "config.yaml").read_text()
        (copied / "config.yaml").write_text(config.replace(str(shapes_world), "/nowhere"))
        collected += ["--collect", f"{name}={copied}"]
    result = run_python(
        *("tools/compare_inits.py", "--output", tmp_path / "report", *collected), cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "report" / "report.html").read_text()
    assert "No pictures of predictions" in html
    assert "/nowhere" in html
