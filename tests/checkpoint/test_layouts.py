"""The tables of names."""

import pytest
import torchvision
from detectron2.modeling import build_backbone

from virtex_d2.checkpoint.layouts import DETECTRON2, TORCHVISION, translate


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
