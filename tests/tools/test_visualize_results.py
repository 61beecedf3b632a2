"""tools/visualize_results.py as it is typed."""

import functools
import json
from pathlib import Path

import pytest
import torch

from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.datasets import register_entries
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.studies.viewer.results import predict

TOOL = Path(__file__).resolve().parents[2] / "tools" / "visualize_results.py"


@pytest.fixture
def visualize(run_tool):
    """`visualize(*arguments)` -> exit code, in this process."""
    return functools.partial(run_tool, TOOL)


def _truth(world):
    return ["--truth", "coco", world / "annotations/instances_test.json", world / "images/test"]


def test_a_results_file_is_shown_beside_the_truth(visualize, world, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    out = tmp_path / "out"
    assert visualize(*_truth(world), "--predictions", tmp_path / "none.json", "--output", out) == 0
    assert len(list((out / "pictures").iterdir())) == 3


def test_a_detector_predicts_on_the_data_set_of_its_config(
    visualize, world, data, small_detector, detector_config, tmp_path, capsys
):
    torch.manual_seed(0)
    count = len(json.loads((world / "annotations/instances_test.json").read_text())["categories"])
    cfg = detector_config("FPN", "MODEL.ROI_HEADS.NUM_CLASSES", count)
    model = DetectionTrainer.build_model(cfg)
    DetectorCheckpointer(model, str(tmp_path)).save("model")
    out = tmp_path / "out"
    code = visualize(
        *small_detector("FPN"),
        *data,
        *("--weights", tmp_path / "model.pth", "--output", out, "--sample", 2),
        *("--score-threshold", 0),
    )
    assert code == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "on 2 images" in printed
    assert " 0 right, 0 wrong" not in printed
    assert len(list((out / "pictures").iterdir())) == 2


def test_a_backbone_is_refused_as_a_detector(
    visualize, data, small_detector, backbone_file, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["--weights", backbone_file("resnet18"), "--output", out]
    assert visualize(*small_detector("FPN"), *data, *arguments) == 2
    error = capsys.readouterr().err
    assert "--weights" in error
    assert "a backbone alone detects nothing" in error
    assert not out.exists()


def test_predictions_have_the_data_sets_own_category_ids(world, detector_config, tmp_path):
    """COCO's ids are known after its file was read, and not before."""
    path = world / "annotations/instances_test.json"
    content = json.loads(path.read_text())
    for item in content["categories"]:
        item["id"] += 70
    for item in content["annotations"]:
        item["category_id"] += 70
    path.write_text(json.dumps(content))
    count = len(content["categories"])
    cfg = detector_config("FPN", "MODEL.ROI_HEADS.NUM_CLASSES", count)
    torch.manual_seed(0)
    DetectorCheckpointer(DetectionTrainer.build_model(cfg), str(tmp_path)).save("model")
    name = f"seventy_{tmp_path.name}"
    cfg.VIRTEX.DATASETS = [[name, "coco", str(path), str(world / "images/test")]]
    register_entries(cfg)
    records = predict(cfg, name, str(tmp_path / "model.pth"))
    assert records
    assert {item["category_id"] for item in records} <= {i["id"] for i in content["categories"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "a.json"], "name the data set with --truth or with --config-file"),
        (["--truth", "coco", "a", "b"], "give --predictions or --weights"),
        (["--truth", "coco", "a", "b", "--weights", "c.pth"], "--weights needs the detector's"),
        (["--truth", "coco", "a", "b", "--predictions", "c"], "a: cannot be read"),
    ],
)
def test_bad_usage_is_told_in_a_line(arguments, message, visualize, tmp_path, capsys):
    assert visualize(*arguments, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
