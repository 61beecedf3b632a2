"""The detectors' config files."""

from pathlib import Path

import pytest

from virtex_d2.config import get_virtex_cfg
from virtex_d2.runtime.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(
    file.relative_to(CONFIGS).as_posix()
    for file in CONFIGS.rglob("*.yaml")
    if "pretrain" not in file.parts
)


@pytest.mark.parametrize("name", FILES)
def test_every_config_feeds_and_trains_the_backbone_as_the_paper_does(name):
    cfg = load_config(get_virtex_cfg(), str(CONFIGS / name), [])
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"
    assert cfg.MODEL.FPN.NORM == ("SyncBN" if "FPN" in name else "")
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert ("C4" in name) == (cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm")


@pytest.mark.parametrize(
    "name", ["coco/mask_rcnn_R_50_FPN_2x.yaml", "coco/mask_rcnn_R_50_C4_2x.yaml"]
)
def test_the_schedule_on_coco_is_the_papers(name):
    cfg = load_config(get_virtex_cfg(), str(CONFIGS / name), [])
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (180000, (120000, 160000))
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert cfg.MODEL.MASK_ON
