"""MODEL.WEIGHTS of every kind through tools/train_net.py: the right network, or the cause."""

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
from virtex_d2.checkpoint.architecture import ResNet

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
        (as_torchvision, ("INPUT.FORMAT", "BGR"), "INPUT.FORMAT is BGR, the file says RGB"),
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
