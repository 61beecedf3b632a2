"""Coordinates in float32 wherever detectron2 would take them in the precision of features.

Under autocast features, predicted offsets and masks are bfloat16, which tells whole pixels apart up
to 256 only: boxes rounded to it were off by 0.8 px on average on 1344 x 800 (4 px at most), and
what is pooled from them by 13 to 16 %. `virtex_d2.engine.compat` calls these as bridges, each when
the module that it mends has been imported. What TorchScript compiles of them it still compiles.
"""

import functools
import sys
from typing import Any

import torch


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def keep_in_roi_align() -> None:
    """Of boxes that features are pooled from; features keep their precision, sums do not."""
    module = sys.modules["detectron2.layers.roi_align"]
    roi_align = module.roi_align

    def forward(self, input, rois):
        assert rois.dim() == 2
        assert rois.size(1) == 5
        if input.is_quantized:
            input = input.dequantize()
        dtype = input.dtype
        if dtype == torch.float16 or dtype == torch.bfloat16:
            input = input.float()
        return roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        ).to(dtype=dtype)

    module.ROIAlign.forward = forward


def keep_in_rotated_roi_align() -> None:
    """As `keep_in_roi_align`; detectron2's own knows of float16 alone."""
    cls = sys.modules["detectron2.layers.roi_align_rotated"].ROIAlignRotated
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        return original(self, _full(input), _full(rois)).to(input.dtype)

    cls.forward = forward


def keep_in_decoding() -> None:
    """Of boxes that are told as offsets from anchors: FCOS's, and rotated ones."""
    module = sys.modules["detectron2.modeling.box_regression"]
    for name in ("Box2BoxTransformRotated", "Box2BoxTransformLinear"):
        if hasattr(module, name):
            _widen(getattr(module, name))


def _widen(cls: type) -> None:
    original = cls.apply_deltas

    @functools.wraps(original)
    def apply_deltas(self: Any, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return original(self, _full(deltas), boxes)

    cls.apply_deltas = apply_deltas


def keep_in_keypoints() -> None:
    """Of keypoints, which are where a heat map is highest."""
    module = sys.modules["detectron2.structures.keypoints"]
    original = module.heatmaps_to_keypoints

    def heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        if maps.dtype != torch.float64:
            maps = maps.float()
        return original(maps, rois)

    module.heatmaps_to_keypoints = heatmaps_to_keypoints


def keep_in_pasted_masks() -> None:
    """Of the places in a mask that an image's pixels are looked up at."""
    module = sys.modules["detectron2.layers.mask_ops"]
    original = module._do_paste_mask

    def _do_paste_mask(
        masks: torch.Tensor, boxes: torch.Tensor, img_h: int, img_w: int, skip_empty: bool = True
    ):
        if masks.dtype != torch.float64:
            masks = masks.float()
        return original(masks, boxes, img_h, img_w, skip_empty)

    module._do_paste_mask = _do_paste_mask
