"""What detectron2's registries get; importing this package registers it."""

from .norm import resolve_norms
from .roi_heads import Res5ROIHeadsExtraNorm

__all__ = ["Res5ROIHeadsExtraNorm", "resolve_norms"]
