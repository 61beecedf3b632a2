"""SyncBN on any device."""

import logging

import pytest
from detectron2.utils import comm
from torch import nn

from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.modeling import resolve_norms


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
