"""Res5ROIHeadsExtraNorm."""

import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from virtex_d2.detection.modeling import Res5ROIHeadsExtraNorm


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
