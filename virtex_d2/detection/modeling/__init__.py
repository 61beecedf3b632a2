"""What detectron2's registries get; importing this package registers it."""

from virtex_d2.detection.modeling.norm import resolve_norms
from virtex_d2.detection.modeling.roi_heads import Res5ROIHeadsExtraNorm

__all__ = ["Res5ROIHeadsExtraNorm", "resolve_norms"]
