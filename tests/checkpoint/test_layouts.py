"""Every project's files into every kind of detector."""

import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.layout_files import (
    DETECTORS,
    EXAMPLES,
    FULL,
    THIN,
    backbone_in,
    random_resnet,
    write,
)
from virtex_d2.checkpoint.layouts import (
    CAFFE2,
    DETECTRON2,
    NAMINGS,
    NORM,
    TORCHVISION,
    translate,
    unwrapped,
)
from virtex_d2.checkpoint.probe import TOLERANCE
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.checkpoint.source import Source, read_backbone
from virtex_d2.checkpoint.transfer import backbone_names, load_backbone


@pytest.fixture(scope="module")
def networks():
    """The ResNet that each file is about, and another one that must not be taken."""
    return random_resnet(seed=1), random_resnet(seed=2)


def resnet_options(architecture):
    return [part for key, value in architecture.config().items() for part in (key, value)]


# Behind the tables of names a layout is a layout: those that differ in names alone need one kind.
ONLY_FPN = ("lightly", "fastai", "sequential stem", "layer0", "fsdp")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in EXAMPLES
        for kind in (["FPN"] if name in ONLY_FPN else ["FPN", "C4", "DC5"])
    ],
)
def test_a_layout_is_recognised_and_loaded_completely(
    name, kind, networks, tmp_path, detector_config
):
    example = EXAMPLES[name]
    options = resnet_options(THIN)
    if name == "msra":
        options += ["MODEL.RESNETS.STRIDE_IN_1X1", True, "INPUT.FORMAT", "BGR"]
        options += ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]]
        options += ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]
    if not example.says_pixels:
        options += ["VIRTEX.PREPROCESSING", "config"]
    if kind == "DC5":
        kind = "C4"
        options += ["MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
        options += ["MODEL.RPN.IN_FEATURES", "['res5']", "MODEL.ROI_HEADS.IN_FEATURES", "['res5']"]
        options += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
        options += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
        options += ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    cfg = detector_config(kind, *options)
    model = build_model(cfg)
    path = example.write(tmp_path, *networks)
    report = load_backbone(model, Source(str(path)), cfg)

    assert (report.layout, report.copy) == (example.layout, example.copy)
    wanted = backbone_names(model.state_dict())
    assert len(report.loaded) == len(wanted) == 265
    assert report.probe.keys() == {"stem", "res2", "res3", "res4", "res5"}
    assert max(report.probe.values()) <= TOLERANCE
    state = model.state_dict()
    for key, tensor in networks[0].items():
        target = translate(key, TORCHVISION, DETECTRON2)
        if target and not (example.folded and "running" in key):
            assert torch.equal(state[wanted[target]], tensor), key


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("moco v2", "momentum"),
        ("moco v3", "momentum"),
        ("dino", "student"),
        ("byol", "target"),
        ("pixpro", "momentum"),
        ("timm with EMA", "ema"),
        ("lightly", "momentum"),
    ],
)
def test_the_other_copy_is_taken_on_demand(name, copy, networks, tmp_path):
    path = EXAMPLES[name].write(tmp_path, *networks)
    backbone = read_backbone(str(path), copy=copy)
    assert backbone.copy == copy
    assert all(torch.equal(backbone.tensors[key], networks[1][key]) for key in backbone.tensors)


@pytest.mark.parametrize("name", ["torchvision", "virtex in DDP", "moco v2"])
def test_a_full_size_resnet_50_is_loaded(name, tmp_path, detector_config):
    networks = random_resnet(FULL, seed=1), random_resnet(FULL, seed=2)
    cfg = detector_config("C4")
    model = build_model(cfg)
    report = load_backbone(model, Source(str(EXAMPLES[name].write(tmp_path, *networks))), cfg)
    assert report.architecture == "resnet50"
    assert len(report.loaded) == 265
    assert max(report.probe.values()) <= TOLERANCE
    back = backbone_in(model)
    assert all(torch.equal(back[key], networks[0][key]) for key in back)


@pytest.mark.parametrize(
    "architecture",
    [
        ResNet(18, res2_channels=64),
        ResNet(34, res2_channels=64),
        ResNet(101, stem_channels=8, res2_channels=16, group_width=4),
        ResNet(152, stem_channels=8, res2_channels=16, group_width=4),
        ResNet(50, stem_channels=8, res2_channels=16, groups=4, group_width=2),
        ResNet(50, stem_channels=8, res2_channels=16, group_width=16),
    ],
    ids=["R-18", "R-34", "R-101", "R-152", "ResNeXt", "wide"],
)
def test_every_depth_and_width_computes_what_the_source_does(
    architecture, tmp_path, detector_config
):
    tensors = random_resnet(architecture, seed=1)
    path = write(tmp_path / "resnet.pth", {"state_dict": tensors})
    cfg = detector_config("FPN", *resnet_options(architecture))
    report = load_backbone(build_model(cfg), Source(str(path)), cfg)
    assert len(report.loaded) == len(architecture.shapes())
    assert max(report.probe.values()) <= TOLERANCE


@pytest.mark.parametrize("name", DETECTORS)
def test_the_backbone_of_a_detector_comes_out(name, networks, tmp_path):
    path = write(tmp_path / "model_final.pth", DETECTORS[name](*networks))
    backbone = read_backbone(str(path))
    assert backbone.layout == "detectron2-detector"
    assert backbone.architecture == THIN
    assert len(backbone.tensors) == 265
    assert all(torch.equal(tensor, networks[0][key]) for key, tensor in backbone.tensors.items())


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("resnet18", (18, 64, 64)),
        ("resnet34", (34, 64, 64)),
        ("resnet50", (50, 256, 64)),
        ("resnet101", (101, 256, 64)),
        ("wide_resnet50_2", (50, 256, 128)),
    ],
)
def test_torchvision_and_detectron2_names_of_a_resnet_match_one_to_one(
    architecture, values, detector_config
):
    keys = ("DEPTH", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
    opts = [part for key, value in zip(keys, values) for part in (f"MODEL.RESNETS.{key}", value)]
    backbone = build_backbone(detector_config("FPN", *opts)).bottom_up
    shapes = {
        name: tensor.shape
        for name, tensor in backbone.state_dict().items()
        if "num_batches" not in name
    }
    original = {
        name: tensor.shape
        for name, tensor in getattr(torchvision.models, architecture)().state_dict().items()
        if not name.startswith("fc.") and "num_batches" not in name
    }
    renamed = {translate(name, TORCHVISION, DETECTRON2): shape for name, shape in original.items()}
    assert renamed == shapes
    assert {translate(name, DETECTRON2, TORCHVISION): shape for name, shape in shapes.items()} == (
        original
    )


@pytest.mark.parametrize(
    "name",
    [
        "fc.weight",
        "layer1.0.conv1",
        "layer1.0.conv1.num_batches_tracked",
        "layer0.0.conv1.weight",
        "xlayer1.0.conv1.weight",
        "layer1.0.conv1.weight.more",
        "res2.0.conv1.weight",
        "",
    ],
)
def test_a_name_that_is_not_of_the_layout_has_no_translation(name):
    assert translate(name, TORCHVISION, DETECTRON2) is None


def test_the_extra_norm_of_c4_is_not_taken_for_a_backbone_tensor():
    assert translate("res5.norm.weight", DETECTRON2, TORCHVISION) is None


NAMES = st.one_of(
    st.sampled_from(["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean"]),
    st.builds(
        "layer{}.{}.{}".format,
        st.integers(1, 4),
        st.integers(0, 40),
        st.one_of(
            st.builds("conv{}.weight".format, st.integers(1, 3)),
            st.builds("bn{}.{}".format, st.integers(1, 3), st.sampled_from(NORM)),
            st.builds("downsample.1.{}".format, st.sampled_from(NORM)),
            st.just("downsample.0.weight"),
        ),
    ),
)


@given(name=NAMES, target=st.sampled_from(NAMINGS))
def test_names_come_back_from_another_naming(name, target):
    there = translate(name, TORCHVISION, target)
    if target is CAFFE2 and "running" in name:
        assert there is None
    else:
        assert translate(there, target, TORCHVISION) == name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.conv1.weight", "conv1.weight"),
        ("_orig_mod.module.encoder_q.layer1.0.bn1.bias", "encoder_q.layer1.0.bn1.bias"),
        ("layer1._fsdp_wrapped_module.0.conv1.weight", "layer1.0.conv1.weight"),
        ("encoder.module.layer1.0._checkpoint_wrapped_module.conv1.weight",)
        + ("encoder.layer1.0.conv1.weight",),
        ("_forward_module.net.fc.bias", "net.fc.bias"),
        ("modules.conv1.weight", "modules.conv1.weight"),
    ],
)
def test_wrappers_are_taken_out_of_names_at_any_depth(name, plain):
    assert unwrapped([name]) == {plain: name}


def test_names_stay_as_they_are_where_two_would_become_one():
    names = ["conv1.weight", "module.conv1.weight"]
    assert unwrapped(names) == {name: name for name in names}


@pytest.mark.parametrize(
    ("name", "caffe2"),
    [
        ("conv1.weight", "conv1_w"),
        ("bn1.bias", "res_conv1_bn_b"),
        ("layer1.0.downsample.0.weight", "res2_0_branch1_w"),
        ("layer1.0.downsample.1.weight", "res2_0_branch1_bn_s"),
        ("layer4.2.conv3.weight", "res5_2_branch2c_w"),
        ("layer4.2.bn2.bias", "res5_2_branch2b_bn_b"),
    ],
)
def test_caffe2_names_are_those_of_the_model_zoo(name, caffe2):
    assert translate(name, TORCHVISION, CAFFE2) == caffe2
