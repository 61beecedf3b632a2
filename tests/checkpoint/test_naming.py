"""The tables of names."""

import pytest
import torchvision
from detectron2.modeling import build_backbone
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.checkpoint.layouts import (
    CAFFE2,
    DETECTRON2,
    NAMINGS,
    NORM,
    TORCHVISION,
    translate,
    unwrapped,
)


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
