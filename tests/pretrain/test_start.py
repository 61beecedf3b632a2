"""What a pretraining starts from: a ResNet of anybody's, whole and verified, or nothing."""

import logging

import pytest
import torch

from pretrain.methods.method import build_method
from pretrain.start import load_start
from tests.checkpoint.layout_files import EXAMPLES, random_resnet, write
from tests.pretrain.tiny_run import VOCAB, tiny_config
from virtex_d2.checkpoint.probe import TOLERANCE
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.engine.errors import InputError

R18 = ResNet(18, res2_channels=64)


@pytest.fixture(scope="module")
def resnet() -> dict[str, torch.Tensor]:
    return random_resnet(R18, seed=1)


def start(path, *opts, method=None):
    """The model of token classification and its config, started from a file."""
    cfg = tiny_config("token_classification")
    cfg.MODEL.WEIGHTS = str(path)
    cfg.merge_from_list(list(opts))
    method = method or build_method(cfg, VOCAB)
    load_start(method, cfg, {}, ())
    return method


def assert_is(method, resnet) -> None:
    state = method.visual.cnn.state_dict()
    for name, tensor in resnet.items():
        if "num_batches" not in name:
            assert torch.equal(state[name], tensor), name


# a layout of each naming, with other networks beside it, and one that a wrapper has gone through
@pytest.mark.parametrize(
    "name", ["virtex in DDP", "torchvision", "moco v2", "dino", "transformers", "lightly", "fsdp"]
)
def test_the_resnet_of_every_layout_is_set_and_computes_what_it_computed(
    tmp_path, resnet, name, caplog
):
    caplog.set_level(logging.INFO)
    path = EXAMPLES[name].write(tmp_path, resnet, random_resnet(R18, seed=2))
    vouched = []
    if name == "moco v2":  # it says resnet50, which this is not
        with pytest.raises(InputError, match="resnet50"):
            start(path)
        vouched = ["VIRTEX.PREPROCESSING", "config"]
    chosen = ["VIRTEX.PREFIX", "visual.cnn."] if "virtex" in name else []
    head = build_method(tiny_config("token_classification"), VOCAB)
    before = head.textual.output.weight.clone()
    assert_is(start(path, *vouched, *chosen, method=head), resnet)
    assert torch.equal(head.textual.output.weight, before)
    table = caplog.text.split("ResNet loaded:")[1]
    errors = table.split("probe    ")[1].split("\n")[0].split(", ")
    assert [error.split()[0] for error in errors] == ["stem", "res2", "res3", "res4", "res5"]
    assert all(float(error.split()[1]) <= TOLERANCE for error in errors)
    assert "2 other tensors of the model start anew" in table


def test_what_is_computed_is_compared(tmp_path, resnet, monkeypatch):
    """With a wrong mean in pretraining's own preprocessing the probe must notice."""
    from pretrain import start as module

    path = write(tmp_path / "resnet.pth", dict(resnet))
    right = module.normalize
    monkeypatch.setattr(module, "normalize", lambda pixels: right(pixels.flip(1)))
    with pytest.raises(InputError, match=r"stem \d.*Likely cause: the channel order \(INPUT"):
        start(path)


@pytest.mark.parametrize(
    ("example", "opts", "message"),
    [
        ("detectron2 backbone", [], "do not say what their network was trained.*vouch for it"),
        ("msra", [], "other pixels than pretraining's.*INPUT.FORMAT BGR"),
        ("msra", ["VIRTEX.PREPROCESSING", "config"], "statistics of its norms are folded"),
        ("torchvision", ["VIRTEX.PREPROCESSING", "auto"], "expected one of check, config"),
        ("torchvision", ["MODEL.VISUAL.NAME", "resnet34"], "Set MODEL.VISUAL.NAME resnet18"),
        ("virtex", [], "is missing.*VIRTEX.PREFIX visual.cnn. starts from its ResNet alone"),
        ("byol", ["VIRTEX.COPY", "onlin"], "copy 'onlin'.*'online'"),
    ],
)
def test_what_would_start_from_another_network_is_refused_and_nothing_loaded(
    tmp_path, resnet, example, opts, message
):
    path = EXAMPLES[example].write(tmp_path, resnet, random_resnet(R18, seed=2))
    cfg = tiny_config("token_classification")
    cfg.merge_from_list(opts)
    method = build_method(cfg, VOCAB)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(InputError, match=message):
        start(path, *opts, method=method)
    after = method.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_network_that_no_config_describes_is_refused_by_name(tmp_path):
    path = write(tmp_path / "thin.pth", random_resnet())
    with pytest.raises(InputError, match="resnet50 with 8 to 16 channels.*can be resnet18, "):
        start(path)


def test_vouched_pixels_are_believed(tmp_path, resnet):
    path = EXAMPLES["detectron2 backbone"].write(tmp_path, resnet, resnet)
    assert_is(start(path, "VIRTEX.PREPROCESSING", "config"), resnet)


def test_a_pretraining_checkpoint_is_still_loaded_whole(tmp_path):
    cfg = tiny_config("token_classification")
    torch.manual_seed(5)
    trained = build_method(cfg, VOCAB)
    path = write(tmp_path / "model.pth", {"model": trained.state_dict(), "iteration": 3})
    started = start(path).state_dict()
    assert all(torch.equal(t, started[n]) for n, t in trained.state_dict().items())


def test_low_scales_of_the_last_norms_are_warned_of(tmp_path, resnet, caplog):
    caplog.set_level(logging.INFO)
    small = {n: t / 50 if n in R18.last_scales() else t for n, t in resnet.items()}
    start(write(tmp_path / "small.pth", small))
    assert "scales of 0.0136 (median; below 0.1 is low)" in caplog.text
    caplog.clear()
    start(write(tmp_path / "resnet.pth", dict(resnet)))
    assert "scales   median 0.678" in caplog.text
    assert "is low" not in caplog.text


def test_a_method_without_a_resnet_refuses_to_choose_one(tmp_path, resnet):
    path = write(tmp_path / "resnet.pth", dict(resnet))
    with pytest.raises(InputError, match="has none"):
        start(path, "VIRTEX.COPY", "ema", method=torch.nn.Linear(2, 2))
