"""What silently goes wrong elsewhere ends in an error here, or in the right network.

Each case was a silent failure of stock detectron2, or is a user's report.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from tests.checkpoint.layout_files import (
    EXAMPLES,
    THIN,
    in_detectron2,
    random_resnet,
    torchvision,
    write,
)
from virtex_d2.checkpoint import probe as probe_module
from virtex_d2.checkpoint.probe import TOLERANCE, probe
from virtex_d2.checkpoint.source import Source, read_backbone
from virtex_d2.checkpoint.transfer import apply_preprocessing, load_backbone, open_weights
from virtex_d2.engine.errors import InputError


@pytest.fixture(scope="module")
def resnet():
    return random_resnet(seed=1)


@pytest.fixture
def thin_config(detector_config):
    """A small FPN detector for `THIN`, with overrides."""
    options = [part for key, value in THIN.config().items() for part in (key, value)]

    def config(*overrides):
        return detector_config("FPN", *options, *overrides)

    return config


def load(path, cfg):
    model = build_model(cfg)
    return model, load_backbone(model, Source(str(path)), cfg)


def test_a_renamed_pth_is_set_without_any_heuristics(resnet, tmp_path, thin_config):
    path = write(tmp_path / "renamed.pth", {"model": in_detectron2(resnet)})
    _, report = load(path, thin_config("VIRTEX.PREPROCESSING", "config"))
    assert len(report.loaded) == 265


def test_a_flat_pickle_without_an_author_keeps_its_running_statistics(
    resnet, tmp_path, thin_config
):
    arrays = {name: tensor.numpy() for name, tensor in in_detectron2(resnet).items()}
    path = write(tmp_path / "flat.pkl", arrays)
    model, report = load(path, thin_config("VIRTEX.PREPROCESSING", "config"))
    assert len(report.loaded) == 265
    name = "backbone.bottom_up.res5.2.conv3.norm.running_var"
    assert torch.equal(model.state_dict()[name], resnet["layer4.2.bn3.running_var"])


def test_a_file_that_does_not_say_how_it_was_trained_must_be_vouched_for(
    resnet, tmp_path, thin_config
):
    path = write(tmp_path / "renamed.pth", {"model": in_detectron2(resnet)})
    with pytest.raises(InputError, match="VIRTEX.PREPROCESSING config") as caught:
        load(path, thin_config())
    assert "  FORMAT: RGB" in str(caught.value).splitlines()


def test_group_norm_is_refused(resnet, tmp_path, thin_config):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    cfg = thin_config("MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    wide = random_resnet(THIN.__class__(50), seed=1)
    path = write(tmp_path / "wide.pth", torchvision(wide, wide))
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 256, 64
    with pytest.raises(InputError, match="NORM 'GN' keeps no running statistics"):
        load(path, cfg)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "naiveSyncBN"])
def test_norms_with_running_statistics_compute_what_the_file_says(
    norm, resnet, tmp_path, thin_config
):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    _, report = load(path, thin_config("MODEL.RESNETS.NORM", norm))
    assert max(report.probe.values()) <= TOLERANCE


WRONG = {
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("key", WRONG)
def test_another_preprocessing_is_refused_before_anything_is_set(
    key, resnet, tmp_path, thin_config
):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    with pytest.raises(InputError, match="does not fit this backbone") as caught:
        load(path, thin_config(key, WRONG[key]))
    message = str(caught.value).splitlines()
    assert key in message[0]
    assert any(line.strip().startswith(key.rpartition(".")[2] + ":") for line in message[1:])


def test_preprocessing_is_applied_on_demand(resnet, tmp_path, thin_config):
    path = EXAMPLES["msra"].write(tmp_path, resnet, resnet)
    cfg = thin_config("MODEL.WEIGHTS", path, "VIRTEX.PREPROCESSING", "auto")
    apply_preprocessing(cfg, open_weights(cfg))
    assert cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is True
    _, report = load(path, cfg)
    assert max(report.probe.values()) <= TOLERANCE


def test_an_unknown_way_with_preprocessing_is_refused(thin_config):
    with pytest.raises(InputError, match="expected one of check, auto, config"):
        apply_preprocessing(thin_config("VIRTEX.PREPROCESSING", "maybe"), None)


# What the detector does wrong, and what the probe says of it.
MISTAKES = {
    "stride": (("MODEL.RESNETS.STRIDE_IN_1X1", True), "STRIDE_IN_1X1"),
    "channels": (("INPUT.FORMAT", "BGR"), "channel order of pixels|INPUT.FORMAT"),
    "mean and std turned": (
        (
            *("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
            *("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
        ),
        "mean and standard deviation only",
    ),
    "std 1": (("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), "standard deviation of 1"),
    "mean 0": (("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]), "mean of 0"),
    "another mean": (("MODEL.PIXEL_MEAN", [120.0, 120.0, 120.0]), "first stage differs already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_probe_names_the_cause(mistake, resnet, tmp_path, thin_config):
    overrides, cause = MISTAKES[mistake]
    backbone = read_backbone(str(write(tmp_path / "tv.pth", torchvision(resnet, resnet))))
    cfg = thin_config(*overrides, "VIRTEX.PREPROCESSING", "config", "VIRTEX.PROBE", False)
    model = build_model(cfg)
    load_backbone(model, Source(backbone.path), cfg)
    result = probe(model, backbone, backbone.preprocessing, cfg.INPUT.FORMAT)
    assert not result.passed
    assert max(result.errors.values()) > 1e-2
    assert re.search(cause, result.cause), result.cause


def test_the_probe_names_the_stage_of_a_changed_tensor(resnet, tmp_path, thin_config):
    backbone = read_backbone(str(write(tmp_path / "tv.pth", torchvision(resnet, resnet))))
    cfg = thin_config()
    model = build_model(cfg)
    load_backbone(model, Source(backbone.path), cfg)
    with torch.no_grad():
        model.backbone.bottom_up.res4[1].conv2.norm.running_var.fill_(1.0)
    result = probe(model, backbone, backbone.preprocessing, "RGB")
    assert result.errors["res3"] <= TOLERANCE < result.errors["res4"]
    assert "res4" in result.cause


def test_a_detector_that_computes_something_else_is_refused(
    resnet, tmp_path, thin_config, monkeypatch
):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    cfg = thin_config()
    model = build_model(cfg)
    model.backbone.bottom_up.res3[0].conv2.stride = (1, 1)
    model.backbone.bottom_up.res3[0].shortcut.stride = (1, 1)
    with pytest.raises(InputError, match="does not compute .*res3"):
        load_backbone(model, Source(str(path)), cfg)


def test_the_probe_leaves_the_model_as_it_was(resnet, tmp_path, thin_config):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    cfg = thin_config()
    model = build_model(cfg).train()
    model.backbone.bottom_up.res2.eval()
    load_backbone(model, Source(str(path)), cfg)
    assert model.training
    assert not model.backbone.bottom_up.res2[0].training
    assert torch.equal(
        model.backbone.bottom_up.stem.conv1.norm.running_mean, resnet["bn1.running_mean"]
    )
    assert probe_module.torch.backends.cudnn.allow_tf32


def test_statistics_that_were_never_trained_are_told_and_warned_of_where_they_are_frozen(
    resnet, tmp_path, thin_config, caplog
):
    fresh = dict(resnet)
    for name in fresh:
        if name.endswith("running_mean") and name != "bn1.running_mean":
            fresh[name] = torch.zeros_like(fresh[name])
        if name.endswith("running_var") and name != "bn1.running_var":
            fresh[name] = torch.ones_like(fresh[name])
    path = write(tmp_path / "tv.pth", torchvision(fresh, fresh))
    _, report = load(path, thin_config())
    assert any(
        "52 norms have running statistics that were never trained" in n for n in report.notes
    )
    assert "no useful scale" not in caplog.text
    load(path, thin_config("MODEL.BACKBONE.FREEZE_AT", 2))
    assert "no useful scale" in caplog.text


def test_the_report_is_written_into_the_output_folder(resnet, tmp_path, thin_config):
    path = EXAMPLES["moco v2"].write(tmp_path, resnet, random_resnet(seed=2))
    _, report = load(path, thin_config())
    written = json.loads(Path(report.write(str(tmp_path))).read_text())
    assert written["source"] == str(path)
    assert len(written["loaded"]) == 265
    assert written["layout"] == "moco"
    assert written["copy"] == "query"
    assert "module.queue" in written["dropped"]
    assert written["preprocessing"]["INPUT.FORMAT"] == "RGB"
    assert set(written["probe"]) == {"stem", "res2", "res3", "res4", "res5"}
    assert written["versions"]["torch"] == torch.__version__


def test_a_detector_is_told_from_a_backbone_by_what_is_in_the_file(resnet, tmp_path):
    from tests.checkpoint.layout_files import DETECTORS

    for name, make in DETECTORS.items():
        assert Source(write(tmp_path / f"{name}.pth", make(resnet, resnet))).is_detector
    assert not Source(write(tmp_path / "a.pth", torchvision(resnet, resnet))).is_detector
