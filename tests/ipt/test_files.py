"""Which checkpoints restore images, and which are refused, and for what reason."""

import struct

import pytest
import torch

from pretrain.methods.ipt.files import read_restorer
from pretrain.methods.ipt.network import IPT, Sizes
from pretrain.methods.ipt.tasks import SIX_TASKS
from tests.ipt import cases
from tests.ipt.restorers import HEADS, tiny_network, write_images, write_restorer
from tests.ipt.tiny import train_here
from virtex_d2.checkpoint.convert import inspect
from virtex_d2.checkpoint.main import describe
from virtex_d2.checkpoint.source import read_backbone
from virtex_d2.engine.errors import InputError


def _released(path, tasks=("x2",)):
    """A state dict and nothing else."""
    torch.save(tiny_network(tasks).state_dict(), path)
    return str(path)


def test_a_restorer_says_its_tasks_and_loads_every_tensor(tmp_path):
    path = write_restorer(tmp_path / "restorer.safetensors")
    for given in (path, str(tmp_path)):  # the file, or the folder of a run
        restorer = read_restorer(given)
        assert restorer.tasks == SIX_TASKS
        assert restorer.network.sizes == tiny_network().sizes
        expected = tiny_network().state_dict()
        found = restorer.network.state_dict()
        assert {*found} == {*expected}
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not restorer.network.training
    task, number = restorer.find("derain")
    assert (task.rain, task.scale, number) == (True, 1, 3)


@pytest.mark.parametrize(
    ("name", "scales", "tasks"),
    [
        ("IPT_sr4.pt", (4,), ("x4",)),
        ("IPT_denoise30.pt", (1,), ("noise30",)),
        ("IPT_denoise50.pt", (1,), ("noise50",)),
        ("IPT_derain.pt", (1,), ("derain",)),
        ("IPT_pretrain.pt", (2, 3, 4, 1, 1, 1), SIX_TASKS),
    ],
)
def test_released_files_are_told_by_their_tensors_and_names(name, scales, tasks, tmp_path):
    # of the released width, from which the heads follow
    with torch.device("meta"):
        network = IPT(Sizes(scales, features=64, patch=6, layers=1))
    state = {key: torch.zeros(tensor.shape) for key, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / name)
    restorer = read_restorer(str(tmp_path / name))
    assert restorer.tasks == tasks
    assert restorer.network.sizes.heads == 12
    assert read_restorer(str(tmp_path / name), heads=8).network.sizes.heads == 8


def test_the_released_codes_network_comes_out_of_its_file(tmp_path):
    case = cases.read_case("ipt_tiny_x2")
    torch.save(cases.state_of(case), tmp_path / "IPT_sr2.pt")
    restorer = read_restorer(str(tmp_path / "IPT_sr2.pt"), case["arguments"]["num_heads"])
    (expected,) = case["expected"]["tasks"]
    x = cases.pixels(case, [case["batch"], 3, 12, 12], case["seed"])
    with torch.no_grad():
        cases.assert_as(restorer.network(x, restorer.find("x2")[1]), expected["output"])


def test_a_file_that_names_no_task_is_believed_about_one_of_its_scale(tmp_path, caplog):
    restorer = read_restorer(_released(tmp_path / "mine.pt", ("derain",)), HEADS)
    assert restorer.tasks == ("",)
    assert restorer.find("noise70")[1] == 0
    assert "mine.pt does not say what it restores" in caplog.text
    with pytest.raises(InputError, match="restores one task of the same size.*--task"):
        restorer.find()
    with pytest.raises(InputError, match="not of task x2.*no part of it enlarges 2 times"):
        restorer.find("x2")


def test_a_task_that_a_checkpoint_lacks_is_refused(tmp_path):
    restorer = read_restorer(write_restorer(tmp_path / "a.safetensors", ("x2", "noise30")))
    for task, match in (
        ("x4", "a.safetensors: is not of task x4: it restores x2, noise30; no part .* 4 times"),
        ("noise50", "is not of task noise50: it restores x2, noise30. Give one of these"),
        ("x5", "'x5' is no task: expected x2, x3, x4, derain, or noise"),
        ("", "restores x2, noise30; say what is to be done with --task"),
    ):
        with pytest.raises(InputError, match=match):
            restorer.find(task)
    only = read_restorer(write_restorer(tmp_path / "b.safetensors", ("x3",)))
    assert only.find()[0].name == "x3"


def test_the_heads_of_attention_are_not_guessed(tmp_path):
    path = _released(tmp_path / "a.pt")
    with pytest.raises(InputError, match="tokens have 36 channels.*released networks 576.*--heads"):
        read_restorer(path)
    with pytest.raises(InputError, match="a.pt: .*36 channels of a token do not divide into 5"):
        read_restorer(path, heads=5)
    with pytest.raises(InputError, match="has 2 heads of attention, --heads says 3"):
        read_restorer(write_restorer(tmp_path / "b.safetensors"), heads=3)


def _without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def _only(*starts):
    return lambda state: {key: value for key, value in state.items() if key.startswith(starts)}


def _nan(state):
    state["body.mlp_head.0.bias"][3] = torch.nan
    return state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_without("body.encoder.layers.0.norm1.bias"), "layers.0.norm1.bias is missing.*Nothing"),
        (
            lambda state: state | {"body.decoder.layers.0.norm4.bias": torch.ones(36)},
            "norm4.bias is not in the model",
        ),
        (
            lambda state: state | {"tail.0.1.weight": torch.ones(3, 5, 3, 3)},
            r"tail.0.1.weight has shape \(3, 5, 3, 3\), the model wants \(3, 4, 3, 3\)",
        ),
        # depths that differ, tails of another scale than their numbers say
        (_only("head", "tail", "body.e", "body.q", "body.p", "body.l"), "0 decoder layers"),
        (_without("tail.0.0.0.weight"), "tail.0.0.0"),
        (lambda state: {"layer1.0.conv1.weight": torch.ones(8, 8, 3, 3)}, "no checkpoint of IPT"),
        (_nan, "1 of its tensors hold NaN or Inf, the first is body.mlp_head.0.bias"),
        (lambda state: {**state, "epoch": 3}, "expected tensors by name.*found 'epoch'"),
    ],
)
def test_what_is_no_whole_ipt_is_refused(change, match, tmp_path):
    torch.save(change(tiny_network(("x2",)).state_dict()), tmp_path / "IPT_sr2.pt")
    with pytest.raises(InputError, match=f"IPT_sr2.pt: .*{match}"):
        read_restorer(str(tmp_path / "IPT_sr2.pt"), HEADS)


def test_a_file_that_says_other_tasks_than_it_has_is_refused(tmp_path):
    network = tiny_network(("x2", "x3"))
    path = write_restorer(tmp_path / "a.safetensors", ("x3", "x2"), network)
    with pytest.raises(InputError, match="a.safetensors: says that its tasks are x3, x2"):
        read_restorer(path)


def _varint(number):
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


def _field(number, content):
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def test_mindspores_files_are_refused_with_the_reason(tmp_path):
    # as MindSpore's save_checkpoint: values of a name and a tensor of shape, type and bytes
    content = b""
    for name, shape in (("body.encoder.layers.0.norm1.gamma", (576,)), ("head.0.0.weight", (2, 3))):
        numbers = struct.pack("<f", 0.5) * torch.Size(shape).numel()
        dims = b"".join(b"\x08" + _varint(size) for size in shape)
        tensor = dims + _field(2, b"Float32") + _field(3, numbers)
        content += _field(1, _field(1, name.encode()) + _field(2, tensor))
    (tmp_path / "ipt.ckpt").write_bytes(content)
    with pytest.raises(InputError, match="ipt.ckpt: is a checkpoint of MindSpore.*not interchange"):
        read_restorer(str(tmp_path / "ipt.ckpt"))
    (tmp_path / "other.ckpt").write_bytes(b"\n\n\n some text")
    with pytest.raises(InputError, match="no format that is known here"):
        read_restorer(str(tmp_path / "other.ckpt"))
    with pytest.raises(InputError, match="expected a file, found nothing"):
        read_restorer(str(tmp_path / "none.pt"))


def test_inspection_names_an_ipt_and_detectors_refuse_it(tmp_path):
    path = write_restorer(tmp_path / "a.safetensors", ("x3", "x4", "derain"))
    found = inspect(path)
    assert found["layout"] == "ipt"
    tensors = len(tiny_network(("x3", "x4", "derain")).state_dict())
    sizes = {"features": 4, "layers": "1 + 1", "patch": 12}
    assert found["config"] == {
        "place": "top level",
        "tensors": tensors,
        "scales": "x3, x4, x1",
        **sizes,
    }
    assert "IPT, which restores images" in describe(found)
    with pytest.raises(InputError, match=r"no ResNet in it: it is an IPT.*\(tasks x3, x4, x1; "):
        read_backbone(path)


@pytest.mark.slow
def test_a_runs_export_and_its_checkpoint_restore_alike(tmp_path):
    size = (60, 50)
    images = write_images(tmp_path / "images", train__a=size, train__b=size, val__a=size)
    train_here(tmp_path / "run", images)
    exported = read_restorer(str(tmp_path / "run"))
    checkpoint = read_restorer(str(tmp_path / "run" / "model_final.pth"))
    assert exported.tasks == checkpoint.tasks == SIX_TASKS
    assert exported.network.sizes == checkpoint.network.sizes
    x = torch.rand(2, 3, 12, 12) * 255
    with torch.no_grad():
        for number in range(len(SIX_TASKS)):
            assert torch.equal(exported.network(x, number), checkpoint.network(x, number))
    assert inspect(str(tmp_path / "run" / "model_final.pth"))["config"]["place"] == "model"
