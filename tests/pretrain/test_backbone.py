"""The backbone in training: compiled, or its blocks computed again."""

import copy
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.backbone import VisualBackbone, find_norm, last_scales
from tests.e2e.captioned_world import THIN_TOOL
from tests.pretrain.test_trainer import options, write_captioned_images
from virtex_d2.engine.errors import InputError


@pytest.fixture(params=["resnet18", "resnet50"])
def plain(request) -> VisualBackbone:
    torch.manual_seed(0)
    return VisualBackbone(request.param, zero_init_residual=False).double()


@pytest.fixture
def backbones(plain) -> tuple[VisualBackbone, VisualBackbone]:
    recomputing = copy.deepcopy(plain)
    recomputing.recompute = "blocks"
    return plain, recomputing


def images(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=generator)


def test_features_gradients_and_running_statistics_are_the_same_to_the_bit(backbones):
    for turn in range(2):  # statistics of the first turn are in the second's
        outputs = [backbone(images(turn)) for backbone in backbones]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.square().mean().backward()
    plain, recomputing = backbones
    for (name, mine), theirs in zip(recomputing.named_parameters(), plain.parameters()):
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(recomputing.named_buffers(), plain.buffers()):
        assert torch.equal(mine, theirs), name


def test_less_is_kept_for_the_backward_pass(backbones):
    plain, recomputing = (kept_bytes(backbone) for backbone in backbones)
    assert recomputing < 0.4 * plain


def kept_bytes(backbone: VisualBackbone) -> int:
    """Of activations, which a larger batch has more of."""
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in backbone.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = backbone(images())
    assert features.requires_grad
    return sum(kept.values())


def test_evaluation_is_that_of_the_plain_backbone(backbones):
    plain, recomputing = (backbone.eval() for backbone in backbones)
    with torch.no_grad():
        assert torch.equal(plain(images()), recomputing(images()))


@pytest.mark.parametrize(("what", "message"), [("block", "'block'"), ("norms", "no more.*blocks")])
def test_what_cannot_be_computed_again_is_refused(what, message):
    with pytest.raises(InputError, match=message):
        VisualBackbone("resnet18", recompute=what)


ROOT = Path(__file__).resolve().parents[2]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
TOOL = "tools/pretrain_net.py"


@pytest.fixture
def quick_compiler(tmp_path) -> Path:
    """A g++ that does not optimise: it takes half of the time, and its code is run a few times."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
@COMPILER
def test_features_gradients_and_running_statistics_are_the_plain_ones(
    tmp_path, monkeypatch, quick_compiler, thin_resnets
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(quick_compiler)))
    torch.manual_seed(0)
    compiled = VisualBackbone("resnet18", compiled=True, zero_init_residual=False).double()
    plain = VisualBackbone("resnet18", zero_init_residual=False).double()
    plain.load_state_dict(compiled.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)

    torch._dynamo.utils.counters.clear()
    outputs = [backbone(images) for backbone in (compiled, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for (name, mine), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        difference = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 1e-9, name
    for (name, mine), theirs in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1  # in one piece

    with torch.no_grad():
        more = torch.cat([images, images])
        torch.testing.assert_close(compiled.eval()(more), plain.eval()(more))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@COMPILER
def test_a_compiled_run_that_is_resumed_ends_as_one_that_was_not_stopped(
    tmp_path, run_python, quick_compiler
):
    for split, number in (("train", 24), ("val", 9)):
        write_captioned_images(tmp_path / "data", number, split)
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code"),
        "CXX": str(quick_compiler),
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def run(output: Path, *more: str):
        compiled = options(tmp_path / "data", output, "MODEL.VISUAL.COMPILE", True)
        arguments = (THIN_TOOL, *more, *compiled)
        done = run_python(*arguments, env=environment, cwd=ROOT, fresh=True, timeout=900)
        assert done.returncode == 0, done.stderr

    run(whole)
    shutil.copytree(whole, resumed)
    (resumed / "model_final.pth").unlink()
    (resumed / "last_checkpoint").write_text("model_0000003.pth")
    run(resumed, "--resume")
    ends = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (whole, resumed)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not [name for name in ends[0] if "_orig_mod" in name]  # any other run can load it


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_before_the_run(tmp_path, run_python):
    write_captioned_images(tmp_path / "data", 4)
    write_captioned_images(tmp_path / "data", 4, "val")
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    arguments = options(tmp_path / "data", tmp_path / "out", "MODEL.VISUAL.COMPILE", True)
    done = run_python(TOOL, *arguments, env=environment, cwd=ROOT, fresh=True)
    assert done.returncode == 2, done.stderr
    assert "error: MODEL.VISUAL.COMPILE True: torch.compile does not work" in done.stderr
    assert "no-such-compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_recomputing_and_compiling_exclude_each_other():
    with pytest.raises(InputError, match="RECOMPUTE.*COMPILE"):
        VisualBackbone("resnet18", recompute="blocks", compiled=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("zero", "scale", "expected"), [(True, 1.0, 0.0), (False, 1.0, 1.0), (False, 0.2, 0.2)]
)
def test_last_norms_start_where_they_are_told_and_nothing_else_changes(name, zero, scale, expected):
    torch.manual_seed(0)
    plain = VisualBackbone(name).state_dict()
    torch.manual_seed(0)
    network = VisualBackbone(name, zero, residual_scale=scale)
    scales = {id(parameter) for parameter in last_scales(network)}
    assert len(scales) == {"resnet18": 8, "resnet50": 16}[name]
    for at, parameter in network.named_parameters():
        if id(parameter) in scales:
            assert (parameter == torch.tensor(expected)).all(), at
        else:
            assert torch.equal(parameter, plain[at]), at


@pytest.mark.parametrize(
    ("zero", "scale", "message"),
    [
        (True, 0.5, "with ZERO_INIT_RESIDUAL True"),
        (False, 0.0, "expected a number above 0"),
        (False, float("nan"), "expected a number above 0"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(zero, scale, message):
    with pytest.raises(InputError, match=message):
        VisualBackbone("resnet18", zero, residual_scale=scale)


def test_norms_are_chosen_by_name_and_device():
    assert find_norm("BN", "cuda") is torch.nn.BatchNorm2d
    assert find_norm("SyncBN", "cuda") is torch.nn.SyncBatchNorm
    with pytest.raises(InputError, match="expected BN or SyncBN, found 'GN'"):
        find_norm("GN", "cpu")
    x = torch.randn(4, 3, 5, 5)
    for alone in (find_norm("SyncBN", "cpu")(3), torch.nn.SyncBatchNorm(3)):  # one process
        assert torch.equal(alone(x), torch.nn.BatchNorm2d(3)(x))
