"""Mask R-CNN and its kin from a pretrained backbone: data, training, evaluation, on detectron2."""
