"""MODEL.WEIGHTS of every kind through tools/train_net.py: the right network, or the cause."""

import socket

import pytest
import torch

from tests.checkpoint.layout_files import (
    EXAMPLES,
    in_detectron2,
    random_resnet,
    torchvision,
    virtex,
    with_prefix,
    write,
)
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.checkpoint.source import read_backbone
from virtex_d2.engine.backbone_file import IMAGENET_RGB
from virtex_d2.engine.safe_load import read_stored

RESNET = ResNet(18, res2_channels=64)
BRIEF = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")


@pytest.fixture(scope="module")
def resnet():
    return random_resnet(RESNET, seed=1)


def as_torchvision(folder, resnet):
    return write(folder / "tv.pth", torchvision(resnet, resnet))


def as_virtex(folder, resnet):
    return write(folder / "virtex.pth", virtex(resnet, resnet))


def as_detectron2(folder, resnet):
    return write(folder / "renamed.pth", {"model": in_detectron2(resnet)})


def as_detector(folder, resnet):
    tensors = with_prefix(in_detectron2(resnet), "backbone.bottom_up.")
    return write(folder / "detector.pth", {"model": tensors})


def as_flat_pickle(folder, resnet):
    arrays = {name: tensor.numpy() for name, tensor in in_detectron2(resnet).items()}
    return write(folder / "flat.pkl", arrays)


def as_dino(folder, resnet):
    return EXAMPLES["dino"].write(folder, resnet, random_resnet(RESNET, seed=2))


# The rows of what stock detectron2 takes without a word, and users' reports.
@pytest.mark.parametrize(
    ("make", "opts"),
    [
        (as_torchvision, ()),
        (as_virtex, ()),
        (as_detectron2, ("VIRTEX.PREPROCESSING", "config")),
        (as_flat_pickle, ("VIRTEX.PREPROCESSING", "config")),
        (as_dino, ()),  # with an argparse.Namespace inside
        (as_torchvision, ("INPUT.FORMAT", "BGR", "VIRTEX.PREPROCESSING", "auto")),
    ],
)
def test_a_file_that_stock_detectron2_leaves_out_is_loaded_whole(
    make, opts, resnet, tool, tmp_path, capsys
):
    code = tool("MODEL.WEIGHTS", make(tmp_path, resnet), "SOLVER.BASE_LR", 0, *opts, *BRIEF)
    assert code == 0, capsys.readouterr().err
    assert "100 of 100 backbone tensors set, 0 missing" in tool.log()
    assert (tool.output / "transfer_report.json").is_file()
    assert ("INPUT.FORMAT: BGR -> RGB, as" in tool.log()) == ("auto" in opts)
    trained = tool.checkpoint("model_final.pth")["model"]
    name = "backbone.bottom_up.res5.1.conv2.weight"
    assert torch.equal(trained[name], resnet["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("make", "opts", "message"),
    [
        (as_torchvision, ("MODEL.RESNETS.NORM", "GN"), "keeps no running statistics"),
        (as_torchvision, ("INPUT.FORMAT", "BGR"), "INPUT.FORMAT is BGR, assumed is RGB"),
        (as_torchvision, ("MODEL.PIXEL_STD", "[1.0,1.0,1.0]"), "MODEL.PIXEL_STD is"),
        (as_torchvision, ("MODEL.PIXEL_MEAN", "[103.5,116.3,123.7]"), "MODEL.PIXEL_MEAN is"),
        (as_torchvision, ("MODEL.RESNETS.STRIDE_IN_1X1", "True"), "STRIDE_IN_1X1 is True"),
        (as_torchvision, ("MODEL.RESNETS.DEPTH", 34), "MODEL.RESNETS.DEPTH is 34"),
        (as_detectron2, (), "do not say what their network was trained with"),
    ],
)
def test_a_config_that_makes_another_network_of_it_is_refused(
    make, opts, message, resnet, tool, tmp_path, capsys
):
    assert tool("MODEL.WEIGHTS", make(tmp_path, resnet), *opts, *BRIEF) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tool.output / "metrics.json").exists()


def test_two_networks_in_one_file_need_a_choice(resnet, tool, tmp_path, capsys):
    both = {**with_prefix(resnet, "visual.cnn."), **with_prefix(resnet, "module.encoder_q.")}
    path = write(tmp_path / "both.pth", both)
    assert tool("MODEL.WEIGHTS", path, *BRIEF) == 2
    assert "fits several layouts" in capsys.readouterr().err
    assert tool("MODEL.WEIGHTS", path, "VIRTEX.LAYOUT", "moco", *BRIEF) == 0


def test_a_prefix_that_the_error_offers_trains(resnet, tool, tmp_path, capsys):
    both = {f"learner.{name}.": random_resnet(RESNET, seed=n) for n, name in enumerate("ab")}
    state = {k: t for prefix, r in both.items() for k, t in with_prefix(r, prefix).items()}
    path = write(tmp_path / "both.pth", {"state_dict": state})
    assert tool("MODEL.WEIGHTS", path, *BRIEF) == 2
    offered = capsys.readouterr().err.strip().partition("(VIRTEX.PREFIX): ")[2].split(", ")
    assert offered == ["learner.a.", "learner.b."]
    assert tool("MODEL.WEIGHTS", path, "VIRTEX.PREFIX", offered[1], *BRIEF) == 0
    assert "layout   torchvision, state_dict/learner.b: resnet18" in tool.log()


def test_an_address_out_of_reach_is_one_line(tool, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/R-50.pkl"
        for opts in ((), ("VIRTEX.PREPROCESSING", "config")):
            assert tool("MODEL.WEIGHTS", address, *opts, *BRIEF) == 2
            (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
            assert line.startswith(f"error: {address}: cannot be fetched: ")


OTHER_PIXELS = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]")


def test_a_detector_is_evaluated_resumed_and_fine_tuned_with_the_pixels_it_was_trained_with(
    resnet, tool, make_tool, tmp_path, capsys
):
    """A config that was mended at the start must not feed the result other pixels later."""
    auto = (*OTHER_PIXELS, "VIRTEX.PREPROCESSING", "auto")
    backbone = as_torchvision(tmp_path, resnet)
    assert tool("MODEL.WEIGHTS", backbone, *auto, *BRIEF) == 0
    backbone.unlink()
    final = tool.output / "model_final.pth"

    assert tool("--eval-only", "MODEL.WEIGHTS", final, *OTHER_PIXELS) == 2
    error = capsys.readouterr().err
    assert "trained with other pixels" in error
    assert "INPUT.FORMAT is BGR, not RGB" in error
    assert tool("--eval-only", "MODEL.WEIGHTS", final) == 0
    for arguments in (
        ("--eval-only", "MODEL.WEIGHTS", final),
        ("--eval-only", "--resume"),
        ("--resume", "MODEL.WEIGHTS", backbone),
    ):
        before = tool.log().count("INPUT.FORMAT: BGR -> RGB")
        assert tool(*arguments, *auto, *BRIEF[:2]) == 0, capsys.readouterr().err
        assert tool.log().count("INPUT.FORMAT: BGR -> RGB") == before + 1
    second = make_tool(folder="second")
    assert second("MODEL.WEIGHTS", final, *OTHER_PIXELS, *BRIEF) == 2
    assert second("MODEL.WEIGHTS", final, *auto, *BRIEF) == 0
    assert "INPUT.FORMAT: BGR -> RGB" in second.log()
    believed = (*OTHER_PIXELS, "VIRTEX.PREPROCESSING", "config")
    assert tool("--eval-only", "MODEL.WEIGHTS", final, *believed) == 0


def test_the_backbone_of_a_detector_knows_how_it_was_trained(resnet, tool, tmp_path):
    assert tool("MODEL.WEIGHTS", as_torchvision(tmp_path, resnet), *BRIEF) == 0
    backbone = read_backbone(str(tool.output / "model_final.pth"))
    assert backbone.preprocessing == IMAGENET_RGB


@pytest.mark.parametrize("make", [as_torchvision, as_detector])
@pytest.mark.parametrize("mode", ["check", "auto"])
def test_the_file_is_read_once(make, mode, resnet, tool, tmp_path, monkeypatch):
    path, read = make(tmp_path, resnet), []

    def counted(file):
        read.append(str(file))
        return read_stored(file)

    monkeypatch.setattr("virtex_d2.engine.safe_load.read_stored", counted)
    monkeypatch.setattr("virtex_d2.engine.checkpointer.read_stored", counted)
    assert tool("MODEL.WEIGHTS", path, "VIRTEX.PREPROCESSING", mode, *BRIEF) == 0
    assert read == [str(path)]
    del read[:]
    assert tool("--resume", "VIRTEX.PREPROCESSING", mode, *BRIEF) == 0
    assert read == [str(tool.output / "model_final.pth")]
