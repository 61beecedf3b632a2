"""SyncBN on any device."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils import comm
from torch import nn

from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.modeling import Res5ROIHeadsExtraNorm, resolve_norms


def _config(device: str):
    cfg = get_virtex_cfg()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = "SyncBN"
    cfg.MODEL.ROI_BOX_HEAD.NORM = "GN"
    return cfg


@pytest.mark.parametrize(("processes", "norm"), [(1, "BN"), (2, "naiveSyncBN")])
def test_syncbn_becomes_a_norm_that_runs_on_a_cpu_and_the_log_says_so(
    processes, norm, monkeypatch, caplog
):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    cfg = _config("cpu")
    with caplog.at_level(logging.INFO):
        resolve_norms(cfg)
    assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.FPN.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM == norm
    assert cfg.MODEL.ROI_BOX_HEAD.NORM == "GN"
    assert "SyncBN does not run on a CPU" in caplog.text
    assert "MODEL.FPN.NORM" in caplog.text


def test_syncbn_stays_on_a_gpu():
    cfg = _config("cuda")
    resolve_norms(cfg)
    assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.FPN.NORM == "SyncBN"


def test_nothing_is_logged_where_nothing_is_replaced(caplog):
    cfg = get_virtex_cfg()
    cfg.MODEL.DEVICE = "cpu"
    with caplog.at_level(logging.INFO):
        resolve_norms(cfg)
    assert not caplog.text


def test_a_cpu_detector_has_batch_norms_in_backbone_and_pyramid(detector_config):
    from detectron2.modeling import build_model

    backbone = build_model(detector_config("FPN")).backbone
    assert type(backbone.bottom_up.stem.conv1.norm).__name__ == "BatchNorm2d"
    assert isinstance(backbone.fpn_lateral2.norm, nn.BatchNorm2d)


def test_the_extra_norm_follows_res5_under_the_name_that_released_checkpoints_have(detector_config):
    heads = build_model(detector_config("C4")).roi_heads
    assert isinstance(heads, Res5ROIHeadsExtraNorm)
    assert [name for name, _ in heads.res5.named_children()] == ["0", "1", "2", "norm"]
    assert isinstance(heads.res5.norm, nn.BatchNorm2d)
    assert heads.res5.norm.num_features == 2048


def test_without_the_norm_it_computes_what_detectron2s_heads_compute(detector_config):
    cfg = detector_config("C4")
    ours = build_model(cfg).roi_heads.res5.eval()
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    theirs_model = build_model(cfg).roi_heads
    assert type(theirs_model) is Res5ROIHeads
    theirs = theirs_model.res5.eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "norm." not in k[:5]})
    x = torch.randn(2, 1024, 14, 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours[:3](x), theirs(x))
        scale = (1 + ours.norm.eps) ** -0.5  # a new norm: mean 0, variance 1
        torch.testing.assert_close(ours(x), theirs(x) * scale)
