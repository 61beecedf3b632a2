"""Files that are not what they should be: each is refused with its cause."""

import re
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layout_files import (
    EXAMPLES,
    FULL,
    THIN,
    head,
    moco,
    random_resnet,
    torchvision,
    virtex,
    with_prefix,
    write,
)
from virtex_d2.checkpoint.architecture import ResNet, recognise_resnet
from virtex_d2.checkpoint.layouts import LAYOUTS
from virtex_d2.checkpoint.source import read_backbone
from virtex_d2.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def resnet():
    return random_resnet(seed=1)


def refused(path, content, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        read_backbone(str(write(path, content)), **options)
    assert str(path) in str(caught.value)


def test_two_layouts_in_one_file_are_refused_unless_one_is_chosen(resnet, tmp_path):
    other = random_resnet(seed=2)
    both = {"model": {**virtex(resnet, other)["model"], **moco(other, other)["state_dict"]}}
    path = tmp_path / "both.pth"
    refused(path, both, "fits several layouts: moco, virtex. .*encoder_k., encoder_q., visual.cnn.")
    assert torch.equal(
        read_backbone(str(path), layout="virtex").tensors["conv1.weight"], resnet["conv1.weight"]
    )
    assert read_backbone(str(path), layout="moco", copy="query").copy == "query"


def test_an_unknown_place_is_refused_unless_a_layout_is_given(resnet, tmp_path):
    path = tmp_path / "novel.pth"
    refused(path, {"weights": with_prefix(resnet, "novel.trunk.")}, r"--prefix \(VIRTEX.PREFIX\): novel.trunk.$")
    backbone = read_backbone(str(path), layout="torchvision")
    assert torch.equal(backbone.tensors["layer4.2.bn3.bias"], resnet["layer4.2.bn3.bias"])


def test_unknown_layouts_and_copies_are_refused_with_the_nearest(resnet, tmp_path):
    path = EXAMPLES["moco v2"].write(tmp_path, resnet, resnet)
    with pytest.raises(InputError, match="Did you mean 'moco'"):
        read_backbone(str(path), layout="mocco")
    with pytest.raises(InputError, match="has query, momentum. Did you mean 'momentum'"):
        read_backbone(str(path), copy="momentun")


def test_a_file_without_the_default_copy_says_which_it_holds(resnet, tmp_path):
    content = {"student": with_prefix(resnet, "module.backbone.")}
    refused(tmp_path / "s.pth", content, "without its copy 'teacher'; it holds student")


def test_the_same_network_in_two_places_is_refused(resnet, tmp_path):
    content = {"state_dict": dict(resnet), "model": dict(resnet)}
    refused(tmp_path / "twice.pth", content, "the same network in several places")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"model": head("cls_token", "blocks.0.attn.qkv.weight")}, "vision transformer"),
        ({"model": head("features.0.weight")}, "no ResNet found among the 1 tensors of model"),
        ({"epoch": 3, "state_dict": {}}, "expected tensors, found none"),
        ({"tensors": [torch.ones(2)]}, "holds no tensors by name"),
    ],
    ids=["transformer", "vgg", "empty", "list"],
)
def test_a_file_without_a_resnet_is_refused(content, match, tmp_path):
    refused(tmp_path / "other.pth", content, match)


@pytest.mark.parametrize(
    "names",
    [
        ("layer1.0.se.fc1.weight",),
        ("conv1.bias",),
        ("layer1.0.conv2.bias",),
        ("layer1.0.downsample.2.weight",),
        ("conv2.weight", "bn2.weight"),
        ("attnpool.positional_embedding",),
    ],
)
def test_a_network_of_another_architecture_is_refused(names, resnet, tmp_path):
    refused(tmp_path / "other.pth", {**resnet, **head(*names)}, "another architecture")


def test_clip_is_refused_by_name(resnet, tmp_path):
    content = {**with_prefix(resnet, "visual."), **head("visual.attnpool.c_proj.weight")}
    refused(tmp_path / "clip.pt", content, "CLIP image encoder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_told(dtype, resnet, tmp_path):
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in resnet.items()}
    backbone = read_backbone(str(write(tmp_path / "half.pth", stored)))
    assert all(tensor.dtype == torch.float32 for tensor in backbone.tensors.values())
    assert torch.equal(backbone.tensors["conv1.weight"], stored["conv1.weight"].float())
    assert str(dtype).removeprefix("torch.") in " ".join(backbone.notes)


def test_whole_numbers_as_weights_are_refused(resnet, tmp_path):
    content = {**resnet, "conv1.weight": torch.ones_like(resnet["conv1.weight"]).int()}
    refused(tmp_path / "int.pth", content, "conv1.weight is torch.int32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value, resnet, tmp_path):
    broken = {name: tensor.clone() for name, tensor in resnet.items()}
    broken["layer2.1.bn2.weight"][1] = value
    refused(tmp_path / "nan.pth", torchvision(broken, broken), "layer2.1.bn2.weight holds NaN")


def test_names_in_messages_are_those_of_the_file(resnet, tmp_path):
    broken = dict(resnet)
    broken["layer2.1.conv1.weight"] = broken["layer2.1.conv1.weight"].transpose(0, 1).contiguous()
    content = moco(broken, resnet)
    refused(tmp_path / "m.pth", content, "module.encoder_q.layer2.1.conv1.weight has shape")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (ResNet(18, res2_channels=64), "resnet18"),
        (ResNet(34, res2_channels=64), "resnet34"),
        (FULL, "resnet50"),
        (ResNet(101), "resnet101"),
        (ResNet(152), "resnet152"),
        (ResNet(50, groups=32, group_width=4), "resnext50_32x4d"),
        (ResNet(101, groups=32, group_width=8), "resnext101_32x8d"),
        (ResNet(50, group_width=128), "wide_resnet50_2"),
        (THIN, "resnet50 with 8 to 16 channels"),
    ],
)
def test_architectures_are_recognised_by_their_tensors(architecture, name):
    tensors = {key: torch.empty(shape) for key, shape in architecture.shapes().items()}
    assert recognise_resnet(tensors, "file") == architecture
    assert architecture.name == name


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet101_2"],
)
def test_shapes_are_torchvisions(name):
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if not key.startswith("fc.") and "num_batches" not in key
    }
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = recognise_resnet(tensors, "file")
    assert found.name == name
    assert found.shapes() == shapes


def test_a_resnet_200_is_refused(tmp_path):
    tensors = random_resnet(THIN)
    tensors |= {
        name.replace("layer2.1.", "layer2.4."): tensor
        for name, tensor in tensors.items()
        if name.startswith("layer2.1.")
    }
    refused(tmp_path / "deep.pth", tensors, "stages of 3-5-6-3 bottlenecks")


def test_layouts_have_names_of_their_own_and_copies_too():
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names)
    for layout in LAYOUTS:
        copies = [copy.name for copy in layout.copies]
        assert len(set(copies)) == len(copies) > 0


def test_the_documentation_has_a_row_for_every_layout():
    rows = {}
    for line in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = cells
    for layout in LAYOUTS:
        told = rows[layout.name][3]
        if layout.refusal:
            assert told.startswith("refused")
            continue
        assert [name for name in re.findall(r"`(\w+)`", told) if "state_dict" not in name] == [
            copy.name for copy in layout.copies
        ]


def test_the_hub_gives_the_network_of_any_layout(tmp_path):
    import torchvision as tv

    networks = random_resnet(FULL, seed=1), random_resnet(FULL, seed=2)
    path = EXAMPLES["moco v2"].write(tmp_path, *networks)
    model = torch.hub.load(str(ROOT), "resnet50", weights=str(path), source="local").eval()
    reference = tv.models.resnet50()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(networks[0], strict=False)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(image), reference.eval()(image))
    thin = EXAMPLES["torchvision"].write(tmp_path, random_resnet(), random_resnet())
    with pytest.raises(InputError, match="expected a resnet50"):
        torch.hub.load(str(ROOT), "resnet50", weights=str(thin), source="local")
