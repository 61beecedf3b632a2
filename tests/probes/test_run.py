"""Whole probes on small sets: results, resuming, refusals, frozen and trained backbones."""

import csv
import json

import pytest
import torch

from tests.checkpoint.layout_files import DETECTORS, EXAMPLES, THIN, random_resnet, write
from virtex_d2.engine import signals, stopping
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.unfinished import Unfinished
from virtex_d2.studies.probes.features import (
    Classifier,
    build_network,
    complete_config,
    fingerprint,
)
from virtex_d2.studies.probes.training import ClassifierTrainer

COLOURS = ["blue", "green", "red"]
SOLVER = [
    *("SOLVER.IMS_PER_BATCH", "10", "SOLVER.EPOCHS", "4", "SOLVER.BASE_LR", "0.1"),
    *("TEST.EVAL_PERIOD", "2"),
]
LONGER = [
    "SOLVER.EPOCHS",
    "40",
    "SOLVER.BASE_LR",
    "1e-4",
    "TEST.EVAL_PERIOD",
    "0",
    "SOLVER.CHECKPOINT_PERIOD",
    "20",
]
LINEAR = ["TASK", "linear", "DATA.FORMAT", "folders", "DATA.TRAIN", "train", "DATA.TEST", "val"]


def results(tmp_path, folder="run"):
    return json.loads((tmp_path / folder / "results.json").read_text())


def table(tmp_path, folder="run"):
    with open(tmp_path / folder / "per_class.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_svms_tell_colours_and_say_how(probe, voc, tmp_path):
    metrics = probe("DATA.ROOT", voc, "DATA.CLASSES", COLOURS)
    assert metrics["mAP11"] > 95
    found = results(tmp_path)
    assert found["metrics"] == metrics
    assert found["backbone"]["architecture"].startswith("resnet50 with")
    assert found["config"]["SVM"]["FOLDS"] == 3
    assert {"torch", "sklearn", "detectron2"} <= set(found["versions"])
    rows = table(tmp_path)
    assert [row["class"] for row in rows] == COLOURS
    mean = sum(float(row["AP11"]) for row in rows) / 3
    assert mean == pytest.approx(metrics["mAP11"])
    assert [row["test_positives"] for row in rows] == ["4"] * 3


def test_the_folder_of_data_sets_may_be_named_by_the_environment(probe, voc, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(voc.parent))
    probe("DATA.ROOT", f"$DETECTRON2_DATASETS/{voc.name}", "DATA.CLASSES", COLOURS)
    assert results(tmp_path)["config"]["DATA"]["ROOT"] == str(voc)


def test_a_class_without_a_test_image_is_not_averaged_as_zero(probe, voc, tmp_path):
    for path in (voc / "Annotations").glob("test*.xml"):
        if "blue" in path.read_text():
            path.write_text("<annotation></annotation>")
    metrics = probe("DATA.ROOT", voc, "DATA.CLASSES", COLOURS)
    assert metrics["mAP11"] > 95
    assert results(tmp_path)["left_out"] == {"blue": "no positive test image"}
    assert [row["class"] for row in table(tmp_path)] == ["green", "red"]


def test_a_finished_run_is_neither_overwritten_nor_repeated(probe, voc, tmp_path, monkeypatch):
    data = ("DATA.ROOT", voc, "DATA.CLASSES", COLOURS)
    metrics = probe(*data)
    with pytest.raises(InputError, match="holds the results.json of another run"):
        probe(*data)
    with monkeypatch.context() as patch:
        patch.setattr("virtex_d2.studies.probes.run.evaluate_svms", None)
        assert probe(*data, resume=True) == metrics
    config = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match=r"SVM.FOLDS was 3, now it is 2"):
        probe(*data, "SVM.FOLDS", "2", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == config


def test_a_linear_classifier_on_cached_features_learns_colours(probe, folders, tmp_path):
    metrics = probe(*LINEAR, "DATA.ROOT", folders, *SOLVER, *LONGER)
    assert set(metrics) == {"top1"}, "five of three classes would always be right"
    assert metrics["top1"] > 90
    assert [row["images"] for row in table(tmp_path)] == ["4"] * 3
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert [line["top1"] for line in lines if "top1" in line] == [metrics["top1"]]
    assert any("lr" in line for line in lines)
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert set(saved["model"]) == {"weight", "bias"}, "a frozen backbone is not saved again"


@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_only_fine_tuning_changes_the_backbone(probe, folders, tmp_path, monkeypatch, task):
    networks = []

    def build(cfg):
        network, about = build_network(cfg)
        networks.append((network, fingerprint(network)))
        return network, about

    monkeypatch.setattr("virtex_d2.studies.probes.run.build_network", build)
    options = ["TASK", task, "INPUT.AUGMENT", "True", "SOLVER.EPOCHS", "2"]
    probe(*LINEAR, "DATA.ROOT", folders, *SOLVER, *options)
    [(network, before)] = networks
    assert (fingerprint(network) == before) == (task == "linear")


def test_a_frozen_backbone_that_learns_is_found_out(probe, folders, monkeypatch):
    """Guards against the released code's norm statistics that moved in a frozen backbone."""
    monkeypatch.setattr(Classifier, "train", torch.nn.Module.train)
    with pytest.raises(RuntimeError, match="frozen network has changed"):
        probe(*LINEAR, "DATA.ROOT", folders, *SOLVER, "INPUT.AUGMENT", "True")


@pytest.mark.parametrize("mode", ["features", "augmented", "finetune"])
def test_a_stopped_run_goes_on_to_the_same_end(probe, folders, tmp_path, monkeypatch, mode):
    task = "finetune" if mode == "finetune" else "linear"
    options = [*LINEAR, "DATA.ROOT", folders, *SOLVER, "TASK", task]
    options += ["INPUT.AUGMENT", str(mode != "features")]
    whole = probe(*options, "OUTPUT_DIR", tmp_path / "whole")

    step = ClassifierTrainer.run_step

    def stop_in_the_third_epoch(trainer):
        if trainer.iter == 7:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(ClassifierTrainer, "run_step", stop_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        probe(*options)
    monkeypatch.setattr(ClassifierTrainer, "run_step", step)
    with pytest.raises(InputError, match="SOLVER.BASE_LR was 0.1, now it is 0.2"):
        probe(*options, "SOLVER.BASE_LR", "0.2", resume=True)
    assert probe(*options, resume=True) == whole
    ends = [
        torch.load(tmp_path / folder / "model_final.pth", weights_only=True)["model"]
        for folder in ("whole", "run")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    kept = [file.name for file in (tmp_path / "whole").glob("model_*.pth")]
    assert len(kept) == 3, f"the last two and the final one, not {kept}"


def test_a_probe_stops_where_it_is_asked_to_and_goes_on(probe, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ignore", lambda: None)
    options = [*LINEAR, "DATA.ROOT", folders, *SOLVER]
    step = ClassifierTrainer.run_step

    def ask_in_the_second_epoch(trainer):
        step(trainer)
        if trainer.iter == 4:
            (tmp_path / "run" / "STOP").touch()

    monkeypatch.setattr(stopping, "STOP_FILE_PERIOD", 0.0)
    monkeypatch.setattr(ClassifierTrainer, "run_step", ask_in_the_second_epoch)
    with pytest.raises(Unfinished):
        probe(*options)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000004.pth"
    monkeypatch.setattr(ClassifierTrainer, "run_step", step)
    assert "top1" in probe(*options, resume=True)
    stopping._watch = None


def test_random_crops_follow_from_the_position_and_not_from_the_workers(probe, folders, tmp_path):
    options = [*LINEAR, "DATA.ROOT", folders, *SOLVER, "INPUT.AUGMENT", "True"]
    ends = []
    for workers in (0, 2):
        folder = tmp_path / f"workers{workers}"
        probe(*options, "DATA.NUM_WORKERS", workers, "OUTPUT_DIR", folder)
        ends.append(torch.load(folder / "model_final.pth", weights_only=True)["model"])
    assert torch.equal(ends[0]["weight"], ends[1]["weight"])


@pytest.mark.parametrize("augment", ["True", "False"])
def test_training_does_without_a_damaged_image_but_a_test_does_not(
    probe, folders, tmp_path, augment
):
    options = [*LINEAR, "DATA.ROOT", folders, *SOLVER, "INPUT.AUGMENT", augment]
    (folders / "train" / "red" / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"red/3\.png"):
        probe(*options)
    options += ["DATA.MAX_SKIPPED_SHARE", "0.05"]
    assert "top1" in probe(*options, "OUTPUT_DIR", tmp_path / "second")
    assert "red/3.png" in (tmp_path / "second" / "log.txt").read_text()
    (folders / "val" / "blue" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"test images cannot be decoded: .*blue/1\.png"):
        probe(*options, "OUTPUT_DIR", tmp_path / "third")


def test_inaturalist_is_fine_tuned(probe, inaturalist, tmp_path):
    metrics = probe(
        *("TASK", "finetune", "DATA.FORMAT", "inaturalist", "DATA.ROOT", inaturalist),
        *("DATA.TRAIN", "train.json", "DATA.TEST", "val.json", *SOLVER),
        *("SOLVER.SCHEDULE", "multistep", "SOLVER.STEPS", [2, 3], "SOLVER.AMP.ENABLED", "True"),
    )
    assert metrics["top1"] >= 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    rates = {line["lr"] for line in lines if "lr" in line}
    assert min(rates) == pytest.approx(0.001)
    assert [row["class"] for row in table(tmp_path)] == ["3 green", "7 red", "11 blue"]


def test_a_loss_that_is_not_finite_stops_the_run(probe, folders):
    with pytest.raises(InputError, match=r"not finite at iteration .*lower SOLVER.BASE_LR"):
        probe(*LINEAR, "DATA.ROOT", folders, *SOLVER, "SOLVER.BASE_LR", "1e38")


@pytest.mark.parametrize("name", [*EXAMPLES, *DETECTORS])
def test_every_checkpoint_of_the_adapter_can_be_probed(make_cfg, tmp_path, name):
    networks = random_resnet(), random_resnet(seed=1)
    if name in EXAMPLES:
        path = EXAMPLES[name].write(tmp_path, *networks)
    else:
        path = write(tmp_path / "model_final.pth", DETECTORS[name](*networks))
    says_pixels = name in EXAMPLES and EXAMPLES[name].says_pixels
    mode = "auto" if says_pixels else "config"
    cfg = make_cfg("MODEL.WEIGHTS", path, "VIRTEX.PREPROCESSING", mode)
    complete_config(cfg)
    network, _ = build_network(cfg)
    assert network.feature_size == 8 * THIN.res2_channels
    assert cfg.INPUT.FORMAT == ("BGR" if name == "msra" else "RGB")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.WEIGHTS", "", "MODEL.WEIGHTS is empty; expected .* or random"),
        ("TASK", "svm", "TASK is 'svm'; expected one of voc_svm"),
        ("DATA.FORMAT", "folders", "TASK voc_svm, DATA.FORMAT is 'folders'; expected one of voc"),
        ("SVM.COSTS", [0.0, 1.0], "SVM.COSTS"),
        ("INPUT.RESIZE", 16, "INPUT.RESIZE 16 is smaller than INPUT.CROP 32"),
        ("DATA.ROOT", "nowhere", "DATA.ROOT 'nowhere': there is no such folder"),
        ("DATA.ROOT", "$NOWHERE/VOC", "DATA.ROOT: .NOWHERE/VOC holds .NOWHERE, and"),
        ("SVM.FOLDS", 1, "SVM.FOLDS is 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_key(probe, voc, key, value, message):
    with pytest.raises(InputError, match=message):
        probe("DATA.ROOT", voc, key, value)
