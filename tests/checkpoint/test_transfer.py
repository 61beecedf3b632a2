"""Backbone file -> detector."""

import logging
import re

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import load_file

from tests.checkpoint.layout_files import backbone_in
from virtex_d2.checkpoint.layouts import DETECTRON2, TORCHVISION, translate
from virtex_d2.checkpoint.source import Source
from virtex_d2.checkpoint.transfer import backbone_names, load_backbone
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors

TENSORS = {"resnet18": 100, "resnet50": 265}


@pytest.mark.parametrize(
    ("kind", "architecture", "opts"),
    [
        ("FPN", "resnet18", ()),
        ("FPN", "resnet50", ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)),
        ("C4", "resnet50", ()),
    ],
)
def test_every_backbone_tensor_is_set_and_comes_back_bit_for_bit(
    kind, architecture, opts, detector_config, backbone_file, caplog
):
    cfg = detector_config(kind, *opts)
    model = build_model(cfg)
    path = str(backbone_file(architecture))
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, Source(path), cfg)
    assert len(report.loaded) == TENSORS[architecture]
    assert report.dropped == ()
    last = {50: "conv3", 18: "conv2"}[cfg.MODEL.RESNETS.DEPTH]
    state = model.state_dict()
    scales = [t for n, t in state.items() if re.search(rf"res\d\.\d+\.{last}\.norm\.weight", n)]
    assert len(scales) == {50: 16, 18: 8}[cfg.MODEL.RESNETS.DEPTH]
    assert report.last_norm_scale == float(torch.cat(scales).abs().median())
    assert f"{len(report.loaded)} of {len(report.loaded)} backbone tensors set" in caplog.text

    original, back = load_file(path), backbone_in(model)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_res5_of_a_c4_detector_is_filled_in_its_roi_heads(detector_config, backbone_file):
    cfg = detector_config("C4")
    model = build_model(cfg)
    path = str(backbone_file("resnet50"))
    report = load_backbone(model, Source(path), cfg)
    name = "roi_heads.res5.2.conv3.norm.running_var"
    assert name in report.loaded
    assert torch.equal(model.state_dict()[name], load_file(path)["layer4.2.bn3.running_var"])
    assert "roi_heads.res5.norm.weight" in report.new


def test_a_file_fits_a_distributed_model(detector_config, backbone_file):
    cfg = detector_config()

    class Wrapped(torch.nn.Module):  # as DistributedDataParallel: the model under this name
        def __init__(self):
            super().__init__()
            self.module = build_model(cfg)

    path = str(backbone_file())
    assert len(load_backbone(Wrapped(), Source(path), cfg).loaded) == TENSORS["resnet18"]


@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_get_the_files_statistics_and_compute_with_them(
    freeze_at, detector_config, backbone_file
):
    cfg = detector_config("FPN", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    model, path = build_model(cfg), str(backbone_file())
    load_backbone(model, Source(path), cfg)
    original, bottom_up = load_file(path), model.backbone.bottom_up
    parts = [bottom_up.stem, bottom_up.res2, bottom_up.res3, bottom_up.res4, bottom_up.res5]
    for index, part in enumerate(parts):
        frozen = index < freeze_at
        assert all(not p.requires_grad for p in part.parameters()) == frozen
    state = bottom_up.state_dict()
    for name, tensor in original.items():
        assert torch.equal(state[translate(name, TORCHVISION, DETECTRON2)], tensor)


def test_the_loaded_backbone_computes_what_the_original_computes(detector_config, backbone_file):
    import torchvision

    cfg, path = detector_config(), str(backbone_file())
    model = build_model(cfg).eval()
    load_backbone(model, Source(path), cfg)
    reference = torchvision.models.resnet18().eval()
    reference.load_state_dict(load_file(path), strict=False)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(image))))
        found = model.backbone.bottom_up(image)
        for stage in (1, 2, 3, 4):
            x = getattr(reference, f"layer{stage}")(x)
            torch.testing.assert_close(found[f"res{stage + 1}"], x, rtol=1e-5, atol=1e-5)


def test_stages_that_the_detector_lacks_are_dropped_and_named(
    detector_config, backbone_file, caplog
):
    cfg = detector_config("C4", "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    report = load_backbone(build_model(cfg), Source(str(backbone_file("resnet50"))), cfg)
    assert len(report.loaded) + len(report.dropped) == TENSORS["resnet50"]
    assert {name.partition(".")[0] for name in report.dropped} == {"layer4"}
    assert "has no res5" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (("INPUT.FORMAT", "BGR"), ["INPUT:", "  FORMAT: RGB"]),
        (("MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]"), ["MODEL:", "  PIXEL_MEAN:"]),
        (("MODEL.PIXEL_STD", "[1.0,1.0,1.0]"), ["MODEL:", "  PIXEL_STD:", "  - 58.395"]),
        (("MODEL.RESNETS.STRIDE_IN_1X1", "True"), ["    STRIDE_IN_1X1: false"]),
    ],
)
def test_other_preprocessing_than_in_pretraining_is_refused_with_the_yaml_to_use(
    overrides, lines, detector_config, backbone_file
):
    cfg = detector_config("FPN", *overrides)
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="does not fit this backbone") as caught:
        load_backbone(model, Source(str(backbone_file())), cfg)
    message = str(caught.value).splitlines()
    assert all(line in message for line in lines)
    assert overrides[0] in message[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("resnet34", "    DEPTH: 34"),
        ("resnet50", "    RES2_OUT_CHANNELS: 256"),
        ("resnet50", "    DEPTH: 50"),
    ],
)
def test_another_depth_is_refused_with_the_yaml_to_use(
    architecture, line, detector_config, backbone_file
):
    cfg = detector_config()
    with pytest.raises(InputError, match="DEPTH is 18") as caught:
        load_backbone(build_model(cfg), Source(str(backbone_file(architecture))), cfg)
    assert line in str(caught.value).splitlines()


def test_another_width_is_refused_with_the_yaml_to_use(detector_config, backbone_file):
    cfg = detector_config("C4")
    with pytest.raises(InputError, match="WIDTH_PER_GROUP is 64, the file says 128"):
        load_backbone(build_model(cfg), Source(str(backbone_file("wide_resnet50_2"))), cfg)


def test_a_norm_without_running_statistics_is_refused(detector_config, backbone_file):
    cfg = detector_config("FPN", "MODEL.RESNETS.NORM", "GN")
    with pytest.raises(InputError, match="NORM 'GN' keeps no running statistics"):
        load_backbone(build_model(cfg), Source(str(backbone_file())), cfg)


def _without(tensors):
    del tensors["layer2.0.bn1.running_mean"]


def _without_a_block(tensors):
    for name in [name for name in tensors if name.startswith("layer3.0.")]:
        del tensors[name]


def _with_a_bias(tensors):
    tensors["conv1.bias"] = torch.ones(64)


def _transposed(tensors):
    tensors["layer3.0.conv1.weight"] = tensors["layer3.0.conv1.weight"].transpose(0, 1).contiguous()


def _negative(tensors):
    tensors["layer3.0.bn2.running_var"][0] = -1


def _with_one_block_more(tensors):
    tensors["layer2.7.conv1.weight"] = torch.zeros(2, 2)


def _reshaped(tensors):
    tensors["layer3.0.conv2.weight"] = torch.zeros(256, 256, 1, 1)


def _not_finite(tensors):
    tensors["layer3.0.conv2.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "layer2.0.bn1.running_mean is missing"),
        (_without_a_block, "layer3 has no block 0"),
        (_with_one_block_more, "layer2 has no block 2"),
        (_with_a_bias, "conv1.bias"),
        (_reshaped, r"layer3.0.conv2.weight has shape \(256, 256, 1, 1\), expected"),
        (_transposed, r"layer3.0.conv1.weight has shape .* \(its dimensions are swapped\)"),
        (_not_finite, "layer3.0.conv2.weight holds NaN or Inf"),
        (_negative, "layer3.0.bn2.running_var holds a negative variance"),
    ],
)
def test_a_file_that_does_not_fit_is_named_tensor_by_tensor_and_changes_nothing(
    damage, message, detector_config, backbone_file, tmp_path
):
    tensors, metadata = read_safetensors(backbone_file())
    damage(tensors)
    path = str(tmp_path / "damaged.safetensors")
    write_safetensors(path, tensors, metadata)
    cfg = detector_config()
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(model, Source(path), cfg)
    assert path in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "expected format_version 1, found '2'"),
        ({"pixel_mean": None, "channel_order": None}, "lacks channel_order, pixel_mean"),
        ({"pixel_mean": "a,b,c"}, "pixel_mean"),
    ],
)
def test_a_file_that_does_not_say_how_it_must_be_fed_is_refused(
    metadata, message, detector_config, backbone_file
):
    cfg = detector_config()
    with pytest.raises(InputError, match=message):
        load_backbone(build_model(cfg), Source(str(backbone_file(**metadata))), cfg)


def test_backbone_tensors_are_told_from_the_detectors_own():
    names = [
        "backbone.bottom_up.stem.conv1.weight",
        "backbone.fpn_lateral2.weight",
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked",
        "roi_heads.res5.norm.weight",
        "roi_heads.res5.0.conv1.weight",
        "proposal_generator.rpn_head.conv.weight",
    ]
    assert backbone_names(names) == {
        "stem.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
        "res5.0.conv1.weight": "roi_heads.res5.0.conv1.weight",
    }
