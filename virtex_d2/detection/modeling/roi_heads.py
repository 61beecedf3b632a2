"""ROI heads."""

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5 heads of a C4 detector with one more norm behind res5 (`roi_heads.res5.norm`).

    MoCo (arXiv 1911.05722, appendix) introduced it: features of a backbone that is trained with
    batch norm arrive at the new box head on a scale it can work with. VirTex uses it for VOC.
    """

    @classmethod
    def _build_res5_block(cls, cfg) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels
