"""Files that are not what they should be: each is refused with its cause."""

import http.server
import re
import socket
import threading
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layout_files import (
    EXAMPLES,
    FULL,
    THIN,
    head,
    in_detectron2,
    in_sequence,
    moco,
    random_resnet,
    torchvision,
    virtex,
    with_prefix,
    write,
)
from virtex_d2.checkpoint.layouts import LAYOUTS
from virtex_d2.checkpoint.resnet import ResNet, recognise_resnet
from virtex_d2.checkpoint.source import local_path, read_backbone
from virtex_d2.engine.errors import InputError

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
    refused(
        path,
        {"weights": with_prefix(resnet, "novel.trunk.")},
        r"--prefix \(VIRTEX.PREFIX\): novel.trunk.$",
    )
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


def advised(message):
    """The prefixes that an error offers."""
    return re.search(r"--prefix \(VIRTEX.PREFIX\): (.*)$", message)[1].split(", ")


def byol_in_lightning(first, second):
    return {
        "state_dict": {
            **with_prefix(first, "learner.online_encoder.net."),
            **with_prefix(second, "learner.target_encoder.net."),
            **head("learner.online_predictor.0.weight"),
        }
    }


# Files of several networks that no name decides between.
SEVERAL = {
    "byol": byol_in_lightning,
    "two places": lambda a, b: {"state_dict": dict(a), "model": dict(b)},
    "top and below": lambda a, b: {**a, "model": dict(b)},
    "wrapped and not": lambda a, b: {**a, **with_prefix(b, "module.")},
    "two projects": lambda a, b: {"m": {**with_prefix(a, "encoder_k."), **virtex(b, a)["model"]}},
    "student, teacher": lambda a, b: {
        "student": with_prefix(a, "novel."),
        "tutor": with_prefix(b, "module.novel."),
    },
    "numbers": lambda a, b: {**in_sequence(a, "f."), **in_sequence(b, "g.module.")},
    "attacked": lambda a, b: {
        "model": {**with_prefix(a, "module.model."), **with_prefix(b, "module.attacker.model.")}
    },
    "detectors": lambda a, b: {
        "model": {
            **in_detectron2(a, "modelTeacher.backbone.bottom_up."),
            **in_detectron2(b, "modelStudent.backbone.bottom_up."),
        }
    },
}


@pytest.mark.parametrize("name", SEVERAL)
def test_each_prefix_that_is_offered_takes_one_of_the_networks(name, resnet, tmp_path):
    other = random_resnet(seed=2)
    path = str(write(tmp_path / "several.pth", SEVERAL[name](resnet, other)))
    with pytest.raises(InputError) as caught:
        read_backbone(path)
    offered = advised(str(caught.value))
    assert len(set(offered)) == len(offered) == 2
    taken = []
    for prefix in offered:
        backbone = read_backbone(path, prefix=prefix)
        assert backbone.copy
        taken.append(float(backbone.tensors["bn1.weight"][0]))
        if prefix != "/":
            assert read_backbone(path, prefix=prefix.rstrip(".")).copy == backbone.copy
    assert sorted(taken) == sorted(float(r["bn1.weight"][0]) for r in (resnet, other))


def test_a_layouts_copies_are_found_behind_any_prefix_where_it_is_given(resnet, tmp_path):
    other = random_resnet(seed=2)
    path = str(write(tmp_path / "byol.ckpt", byol_in_lightning(resnet, other)))
    for copy, tensors in (("online", resnet), ("target", other)):
        backbone = read_backbone(path, layout="byol", copy=copy)
        assert torch.equal(backbone.tensors["conv1.weight"], tensors["conv1.weight"])
    with pytest.raises(InputError) as caught:
        read_backbone(path, layout="torchvision")
    assert advised(str(caught.value)) == [
        "learner.online_encoder.net.",
        "learner.target_encoder.net.",
    ]
    with pytest.raises(InputError, match="no ResNet in layout moco"):
        read_backbone(path, layout="moco")
    with pytest.raises(InputError, match="no ResNet in layout transformers"):
        read_backbone(path, layout="transformers", copy="model")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prefix": "learner."}, "prefix 'learner.' is of none of the ResNets"),
        ({"prefix": "learner.online_encoder.net", "copy": "online"}, "leave one out"),
        ({"prefix": "learner.online_encoder.net", "layout": "msra"}, "Leave --layout"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused_with_what_does(options, match, resnet, tmp_path):
    refused(tmp_path / "byol.ckpt", byol_in_lightning(resnet, resnet), match, **options)


def test_a_prefix_goes_with_its_layout(resnet, tmp_path):
    path = str(write(tmp_path / "byol.ckpt", byol_in_lightning(resnet, resnet)))
    prefix = "state_dict/learner.target_encoder.net."
    backbone = read_backbone(path, "byol", prefix=prefix)
    assert (backbone.layout, backbone.copy) == ("byol", prefix.rstrip("."))
    moco_path = EXAMPLES["moco v2"].write(tmp_path, resnet, random_resnet(seed=2))
    backbone = read_backbone(str(moco_path), prefix="encoder_k")
    assert (backbone.layout, backbone.copy) == ("moco", "momentum")


def test_one_tensor_under_two_names_is_refused(resnet, tmp_path):
    content = {**resnet, "layer0.0.weight": resnet["conv1.weight"]}
    refused(tmp_path / "twice.pth", content, "layer0.0.weight")


ADVICE = "Download it where that works, and give the file's path."


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # the base class's name
        code = {"/there.pth": 200, "/forbidden.pth": 403}.get(self.path, 404)
        if self.path == "/cut.pth":  # ends before what it announces
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"short")
            return
        self.send_response(code)
        self.end_headers()
        self.wfile.write(b"weights" if code == 200 else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of this machine; downloads go into a cache of the test."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def not_fetched(address):
    with pytest.raises(InputError) as caught:
        local_path(address)
    message = str(caught.value)
    assert message.startswith(f"{address}: ")
    assert message.endswith(ADVICE)
    assert "\n" not in message
    return message


def test_a_file_is_fetched(server):
    for address in (f"{server}/there.pth", f"HTTP{server[4:]}/there.pth"):
        with open(local_path(address), "rb") as file:
            assert file.read() == b"weights"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("forbidden.pth", "HTTP Error 403"),
        ("absent.pth", "HTTP Error 404"),
        ("cut.pth", "retrieval incomplete"),
    ],
)
def test_what_a_server_does_not_give_is_one_line(path, reason, server):
    assert reason in not_fetched(f"{server}/{path}")


def test_a_port_that_nobody_listens_on_is_one_line(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, so that no other process listens there
        assert "refused" in not_fetched(f"http://127.0.0.1:{unused.getsockname()[1]}/R-50.pkl")


def test_a_name_that_detectron2_does_not_have_is_one_line(server, monkeypatch):
    from detectron2.utils.file_io import Detectron2Handler

    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{server}/zoo/")
    assert "HTTP Error 404" in not_fetched("detectron2://ImageNetPretrained/R-51.pkl")
    not_fetched("catalog://ImageNetPretrained/None")


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/R-50.pkl", "gs://bucket/a.pth", "torchvision://resnet50", "hf://me/model"],
)
def test_a_scheme_that_is_not_known_is_one_line_with_those_that_are(address):
    message = not_fetched(address)
    assert "https://" in message
    assert "detectron2://" in message


def test_paths_stay_as_they_are():
    for path in ("", "output/backbone.safetensors", "/a:/b.pth", "C:/x.pth"):
        assert local_path(path) == path
    assert local_path("file:///a%20b/c.pth") == "/a b/c.pth"
