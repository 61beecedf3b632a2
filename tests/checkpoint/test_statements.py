"""What a file says of itself is heard, compared, and told from what is assumed."""

import argparse
import logging
import pickle
import re
import sys
import types
from collections import OrderedDict

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import save_file

from tests.checkpoint.layout_files import (
    EXAMPLES,
    FULL,
    THIN,
    head,
    in_detectron2,
    random_resnet,
    torchvision,
    with_prefix,
    write,
)
from virtex_d2.checkpoint.convert import convert, inspect
from virtex_d2.checkpoint.layouts import MSRA_BGR
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.checkpoint.source import Source, read_backbone
from virtex_d2.checkpoint.statements import _read_config, hear, weigh
from virtex_d2.checkpoint.transfer import apply_preprocessing, load_backbone, open_weights
from virtex_d2.engine.backbone_file import IMAGENET_RGB, MEAN, ORDER, STD, STRIDE
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.safe_load import read_tensors

CAFFE = [103.53, 116.28, 123.675]
RGB = [123.675, 116.28, 103.53]
PIXELS = (ORDER, MEAN, STD, STRIDE)


@pytest.fixture(scope="module")
def resnet():
    return random_resnet(seed=1)


@pytest.fixture
def thin_config(detector_config):
    options = [part for key, value in THIN.config().items() for part in (key, value)]
    return lambda *overrides: detector_config("FPN", *options, *overrides)


def applied(cfg):
    return apply_preprocessing(cfg, open_weights(cfg))


def folded(tensors):
    """As detectron2 and OpenMMLab have Caffe's networks."""
    fills = {"running_mean": 0.0, "running_var": 1.0}
    return {
        name: torch.full_like(tensor, fills[name.rpartition(".")[2]])
        if name.rpartition(".")[2] in fills
        else tensor
        for name, tensor in tensors.items()
    }


def said(content, metadata=(), states=None, architecture=FULL):
    heard = hear(content, dict(metadata), states or {})
    found, doubts = weigh(heard, architecture)
    return {key: statement.value for key, statement in found.items()}, doubts


def text(style="caffe", mean=CAFFE, std=(1.0, 1.0, 1.0), to_rgb=False):
    return (
        f'norm = dict(mean={mean}, std={list(std)}, to_rgb={to_rgb})  # "of" Caffe\'s\n'
        f"model = dict(\n    type='MaskRCNN', backbone=dict(type='ResNet', depth=50, "
        f"strides=(1, 2, 2, 2), style='{style}'), neck=None, lr=2 * 0.01)\n"
        "pipeline = [dict(type='Load'), dict(type='Normalize', **norm)]\n"
    )


ALL_CAFFE = {ORDER: "BGR", MEAN: CAFFE, STD: [1.0] * 3, STRIDE: True}
ALL_RGB = IMAGENET_RGB.config()
PARTLY = {key: ALL_RGB[key] for key in (ORDER, MEAN, STD)}


def mm_dict(**normalize):
    return {"cfg": {"model": {"data_preprocessor": normalize, "backbone": {"style": "pytorch"}}}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"meta": {"config": text()}}, ALL_CAFFE),
        ({"meta": {"cfg": text("pytorch", RGB, ALL_RGB[STD], True)}}, ALL_RGB),
        ({"meta": mm_dict(mean=RGB, std=ALL_RGB[STD], bgr_to_rgb=True)}, ALL_RGB),
        ({"meta": {"config": '{"norm": {"mean": [1, 2, 3.5], "std": [4, 5, 6], "to_rgb": true}}'}},)
        + ({ORDER: "RGB", MEAN: [1.0, 2.0, 3.5], STD: [4.0, 5.0, 6.0]},),
        # OpenSelfSup's, on the scale 0 to 1
        ({"meta": {"config": "n = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"}},)
        + (PARTLY,),
        ({"default_cfg": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}}, PARTLY),
        ({"pretrained_cfg": {"mean": (0.5,) * 3, "std": (0.5,) * 3}},)
        + ({MEAN: [127.5] * 3, STD: [127.5] * 3},),
        ({"default_cfg": {"mean": (0, 0, 0), "std": (1, 1, 1)}}, {MEAN: [0.0] * 3, STD: [255] * 3}),
        ({"cfg": {"MODEL": {"PIXEL_MEAN": CAFFE, "PIXEL_STD": [57.0, 57.0, 58.0]}}},)
        + ({ORDER: "BGR", MEAN: CAFFE, STD: [57.0, 57.0, 58.0]},),
        ({"cfg": {"INPUT": {"FORMAT": "BGR"}}}, {ORDER: "BGR"}),
        ({"config": {"downsample_in_bottleneck": True}}, {STRIDE: True}),
        # the flag counts, not what the order of the mean looks like
        ({"meta": {"config": text(mean=RGB)}}, {**ALL_CAFFE, MEAN: RGB}),
        ({"args": {"mean": None, "std": None, "lr": 0.1}}, {}),
        ({"meta": {"config": "init = dict(type='Normal', mean=0, std=0.01)"}}, {}),
        ({"meta": {"config": "a = ((((" * 9999}, "state": {1: 2}}, {}),
        (["no", "dict"], {}),
    ],
)
def test_pixels_and_stride_are_heard_wherever_projects_write_them(content, expected):
    found, doubts = said(content)
    assert doubts == []
    assert found == {key: pytest.approx(value) for key, value in expected.items()}


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("pixel_mean", "pixel_std"), (RGB, ALL_RGB[STD]), PARTLY),
        (
            ("module.pixel_mean", "module.pixel_std"),
            (CAFFE, [57.0, 57.0, 58.0]),
        )
        + ({ORDER: "BGR", MEAN: CAFFE, STD: [57.0, 57.0, 58.0]},),
        (("data_preprocessor.mean", "data_preprocessor.std"), (RGB, ALL_RGB[STD]), PARTLY),
        (
            ("normalizer.new_mean", "normalizer.new_std"),
            ([0.485, 0.456, 0.406], [0.25] * 3),
        )
        + ({ORDER: "RGB", MEAN: RGB, STD: [63.75] * 3},),
        (("a.running_mean", "a.running_var"), (RGB, RGB), {}),
        (("pixel_mean", "other"), (RGB, RGB), {}),
    ],
)
def test_buffers_say_mean_and_std_and_imagenets_mean_the_order(names, values, expected):
    state = {n: torch.tensor(v).view(3, 1, 1) for n, v in zip(names, values)}
    found, _ = said({}, states={"model": state})
    assert found == {key: pytest.approx(value) for key, value in expected.items()}


@pytest.mark.parametrize(
    ("settings", "architecture", "match"),
    [
        ({"arch": "resnet18"}, FULL, "arch says 'resnet18', but its tensors are .* a resnet50"),
        ({"args": argparse.Namespace(arch="resnet101")}, FULL, "args.arch says 'resnet101'"),
        ({"hyper_parameters": {"backbone": "wide_resnet50_2"}}, FULL, "'wide_resnet50_2'"),
        ({"hyper_parameters": {"backbone": {"depth": 34}}}, FULL, "backbone.depth says 34"),
        ({"arch": "resnext50_32x4d"}, FULL, "arch says 'resnext50_32x4d'"),
        ({"arch": "resnet50"}, ResNet(50, groups=32, group_width=4), "but its tensors are"),
        ({"opt": argparse.Namespace(model="resnetblur50")}, FULL, "another kind of ResNet"),
        ({"arch": "seresnet50"}, FULL, "another kind of ResNet"),
        ({"args": {"output_stride": 8}}, FULL, "output_stride says 8, which is no plain ResNet's"),
        ({"args": argparse.Namespace(bn_eps=0.001)}, FULL, "bn_eps says 0.001"),
        ({"meta": {"config": "m = dict(backbone=dict(depth=101))"}}, FULL, "depth says 101"),
        (
            {"meta": {"config": text(), "cfg": text("pytorch")}},
            FULL,
            "two things of .*STRIDE",
        ),
        ({"cfg": {"FORMAT": "BGR"}, "args": {"color_space": "rgb"}}, FULL, "two things of INPUT"),
        ({"args": {"img_mean": CAFFE, "img_std": [1, 1, 1]}}, FULL, "nobody whether the stride"),
    ],
)
def test_what_contradicts_itself_or_the_tensors_is_a_doubt(settings, architecture, match, tmp_path):
    path = write(tmp_path / "said.pth", {**settings, "w": torch.ones(1)})
    _, doubts = said(read_tensors(str(path)).content, architecture=architecture)
    assert len(doubts) == 1
    assert re.search(match, doubts[0]), doubts


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "resnet50", "args": {"model": "resnet50.a1_in1k"}},
        {"arch": "vit_base_patch16", "hyper_parameters": {"encoder": "mine"}},
        {"arch": "tv_resnet50"},
        {"model_name": "microsoft/resnet-50"},
        {"args": {"arch": "resnet50_moco_800ep", "teacher_arch": "resnet101"}},
        {"student": {"backbone": {"depth": 50}}, "other": {"backbone": {"depth": 101}}},
        {"args": {"output_stride": None, "bn_eps": None}},
        {"meta": {"config": text()}},
    ],
)
def test_what_agrees_or_is_not_known_is_no_doubt(settings):
    assert said(settings)[1] == []


def test_objects_say_their_attributes_and_items_without_being_built(tmp_path, monkeypatch):
    """Namespaces, and dicts of other classes: Lightning's, OpenMMLab's, OmegaConf's."""
    module = types.ModuleType("elsewhere")

    class AttributeDict(dict):
        pass

    class DictConfig:
        pass

    class AnyNode:
        pass

    for cls in (AttributeDict, DictConfig, AnyNode):
        cls.__module__, cls.__qualname__ = "elsewhere", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    node, config = AnyNode(), DictConfig()
    node._val = "resnet18"
    config.__dict__["_content"] = {"backbone": node}
    config.__dict__["itself"] = config
    contents = [
        {"args": argparse.Namespace(arch="resnet18", itself=[config])},
        {"hyper_parameters": AttributeDict(args=argparse.Namespace(arch="resnet18"))},
        {"cfg": config},
        {"nested": AttributeDict(backbone=AttributeDict(depth=18))},
    ]
    for protocol in (0, 2, 4):
        paths = [tmp_path / f"{number}-{protocol}.pkl" for number in range(len(contents))]
        for path, content in zip(paths, contents):
            path.write_bytes(pickle.dumps({**content, "w": torch.ones(1).numpy()}, protocol))
    monkeypatch.delitem(sys.modules, "elsewhere")
    for path in sorted(tmp_path.glob("*.pkl")):
        stored = read_tensors(str(path))
        doubts = said(stored.content)[1]
        assert len(doubts) == 1, path
        assert "18" in doubts[0]
        assert stored.foreign


def test_a_configs_text_is_read_without_running_it(tmp_path):
    read = _read_config(
        f"import os\nos.system('touch {tmp_path}/ran')\na = dict(b=[1, -2.5, 1e-05], c='x', "
        "d=__import__('os').getcwd(), e=[1] + [2], f=(True, None), **z) # b = 3\ng = a['b']\n"
    )
    assert read["a"] == {
        "b": [1, -2.5, 1e-05],
        "c": "x",
        "d": None,
        "e": None,
        "f": [True, None],
    }
    assert list(tmp_path.iterdir()) == []


def test_a_caffe_network_in_torchvisions_names_must_be_vouched_for(resnet, tmp_path, thin_config):
    content = {"state_dict": {**folded(resnet), "conv1.bias": torch.zeros(8)}}
    path = write(tmp_path / "caffe.pth", content)
    for mode in ("check", "auto"):
        cfg = thin_config("VIRTEX.PREPROCESSING", mode, "MODEL.WEIGHTS", path)
        with pytest.raises(InputError, match=r"0 and 1: they are folded .* config\.$"):
            applied(cfg)
            load_backbone(build_model(cfg), Source(str(path)), cfg)
    assert "VIRTEX.PREPROCESSING config" in " ".join(inspect(str(path))["notes"])
    with pytest.raises(InputError, match="folded"):
        convert(str(path), str(tmp_path / "b.safetensors"), "backbone")

    keys = [part for item in MSRA_BGR.config().items() for part in item]
    cfg = thin_config("VIRTEX.PREPROCESSING", "config", *keys)
    report = load_backbone(build_model(cfg), Source(str(path)), cfg)
    assert report.vouched
    assert len(report.loaded) == 265


def test_a_folded_network_is_known_through_a_conversion(resnet, tmp_path):
    """What detectron2 sets for Caffe2's statistics is no variance of 1 to the last bit."""
    source = str(EXAMPLES["msra"].write(tmp_path, resnet, resnet))
    convert(source, str(tmp_path / "tv.pth"), "torchvision")
    assert read_backbone(str(tmp_path / "tv.pth")).doubts
    convert(source, str(tmp_path / "tv.safetensors"), "torchvision")  # whose metadata say it
    backbone = read_backbone(str(tmp_path / "tv.safetensors"))
    assert backbone.preprocessing == MSRA_BGR
    assert set(backbone.assumed) == set(PIXELS)  # as of the source


def test_caffe2s_resnexts_were_fed_otherwise_than_its_resnets(tmp_path):
    tensors = random_resnet(ResNet(50, 8, 16, groups=4, group_width=2))
    path = EXAMPLES["msra"].write(tmp_path, tensors, tensors)
    assert "ResNeXt" in read_backbone(str(path)).doubts[0]


def test_a_fresh_network_is_not_taken_for_a_folded_one(tmp_path):
    fresh = folded(random_resnet(seed=3))
    for name in fresh:
        if name.endswith(".weight") and fresh[name].dim() == 1:
            fresh[name] = torch.full_like(fresh[name], 0.0 if "bn3" in name else 1.0)
    backbone = read_backbone(str(write(tmp_path / "fresh.pth", fresh)))
    assert backbone.doubts == ()
    assert "never trained" in " ".join(backbone.notes)


@pytest.mark.parametrize("place", ["conv1", "layer1.0.conv2", "layer2.0.downsample.0"])
def test_a_convolutions_bias_of_zeros_is_no_other_architecture(place, resnet, tmp_path):
    bias = {f"{place}.bias": torch.zeros(8)}
    backbone = read_backbone(str(write(tmp_path / "b.pth", {**resnet, **bias})))
    assert f"{place}.bias" in backbone.dropped


def test_what_the_file_says_goes_before_its_layouts_custom(resnet, tmp_path, thin_config):
    state = with_prefix(folded(resnet), "backbone.")
    path = write(tmp_path / "mm.pth", {"meta": {"config": text()}, "state_dict": state})
    with pytest.raises(InputError, match="INPUT.FORMAT is RGB, the file says BGR"):
        cfg = thin_config()
        load_backbone(build_model(cfg), Source(str(path)), cfg)
    cfg = thin_config("VIRTEX.PREPROCESSING", "auto", "MODEL.WEIGHTS", path)
    lines = applied(cfg)
    assert f"INPUT.FORMAT: RGB -> BGR, as {path} says" in lines
    report = load_backbone(build_model(cfg), Source(str(path)), cfg)
    assert report.preprocessing == MSRA_BGR.config()
    assert report.assumed == ()


def test_an_architecture_that_the_tensors_are_not_is_refused_with_both_names(
    resnet, tmp_path, thin_config
):
    path = write(tmp_path / "said.pth", {"arch": "resnet18", "state_dict": resnet})
    cfg = thin_config()
    with pytest.raises(InputError, match="'resnet18', but its tensors are those of a resnet50"):
        load_backbone(build_model(cfg), Source(str(path)), cfg)
    cfg = thin_config("VIRTEX.PREPROCESSING", "config")
    assert "'resnet18'" in " ".join(load_backbone(build_model(cfg), Source(str(path)), cfg).notes)


def test_what_nobody_says_is_logged_as_assumed(resnet, tmp_path, thin_config, caplog):
    path = write(tmp_path / "tv.pth", torchvision(resnet, resnet))
    cfg = thin_config()
    with caplog.at_level(logging.INFO):
        report = load_backbone(build_model(cfg), Source(str(path)), cfg)
    assert set(report.assumed) == set(PIXELS)
    assert "the file does not say, assumed: INPUT.FORMAT, MODEL.PIXEL_MEAN" in caplog.text
    assert "as the file says" not in caplog.text
    cfg = thin_config("INPUT.FORMAT", "BGR")
    with pytest.raises(InputError, match="INPUT.FORMAT is BGR, assumed is RGB"):
        load_backbone(build_model(cfg), Source(str(path)), cfg)
    cfg = thin_config(
        *("INPUT.FORMAT", "BGR", "VIRTEX.PREPROCESSING", "auto", "MODEL.WEIGHTS", path)
    )
    assert applied(cfg) == [f"INPUT.FORMAT: BGR -> RGB, assumed: {path} does not say"]


def test_an_assumption_stays_one_through_conversions(resnet, tmp_path):
    source = str(write(tmp_path / "tv.pth", torchvision(resnet, resnet)))
    for to, name in (("backbone", "b.safetensors"), ("detectron2", "r.pkl")):
        convert(source, str(tmp_path / name), to)
        backbone = read_backbone(str(tmp_path / name))
        assert backbone.preprocessing == IMAGENET_RGB
        assert set(backbone.assumed) == set(PIXELS)


def detector(resnet, **more):
    state = {**in_detectron2(resnet, "backbone.bottom_up."), **more}
    return {"model": {**state, **head("roi_heads.box_predictor.cls_score.weight")}}


def pixels(mean, std, prefix=""):
    values = {"pixel_mean": mean, "pixel_std": std}
    return {f"{prefix}{name}": torch.tensor(v).view(3, 1, 1) for name, v in values.items()}


OTHER = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", CAFFE, "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_detectors_own_pixels_are_compared_or_set(prefix, resnet, tmp_path, thin_config):
    content = detector(resnet, **pixels(RGB, ALL_RGB[STD], prefix))
    path = write(tmp_path / "old.pth", content)
    with pytest.raises(InputError, match="INPUT.FORMAT is BGR, not RGB"):
        applied(thin_config("MODEL.WEIGHTS", path, *OTHER))
    cfg = thin_config("MODEL.WEIGHTS", path, *OTHER, "VIRTEX.PREPROCESSING", "auto")
    lines = applied(cfg)
    assert pytest.approx(RGB) == cfg.MODEL.PIXEL_MEAN
    assert cfg.INPUT.FORMAT == "RGB"
    assert "STRIDE_IN_1X1: not checked" in lines[0]
    assert len(applied(thin_config("MODEL.WEIGHTS", path))) == 1  # the stride


@pytest.mark.parametrize("mode", ["check", "auto"])
def test_a_detectors_file_that_says_nothing_is_told_to_be_unchecked(
    mode, resnet, tmp_path, thin_config
):
    path = write(tmp_path / "new.pth", detector(resnet))
    cfg = thin_config("MODEL.WEIGHTS", path, "VIRTEX.PREPROCESSING", mode)
    (line,) = applied(cfg)
    assert all(key in line for key in PIXELS)
    assert "not checked" in line


def test_a_detector_that_says_two_things_is_refused(resnet, tmp_path, thin_config):
    both = {**pixels(RGB, ALL_RGB[STD]), **pixels(CAFFE, ALL_RGB[STD], "teacher.")}
    path = write(tmp_path / "two.pth", detector(resnet, **both))
    with pytest.raises(InputError, match="it says two things of MODEL.PIXEL_MEAN"):
        applied(thin_config("MODEL.WEIGHTS", path))
    assert applied(thin_config("MODEL.WEIGHTS", path, "VIRTEX.PREPROCESSING", "config")) == []


def test_safetensors_metadata_are_heard(resnet, tmp_path):
    path = tmp_path / "said.safetensors"
    says = {"pixel_mean": "120,110,100", "pixel_std": "60,60,60", "channel_order": "BGR"}
    save_file(OrderedDict(resnet), path, metadata={**says, "architecture": "resnet50"})
    backbone = read_backbone(str(path))
    assert backbone.preprocessing.mean == (120.0, 110.0, 100.0)
    assert backbone.preprocessing.channel_order == "BGR"
    assert backbone.assumed == (STRIDE,)
