"""Annotations in any of `FORMATS` -> packed records of images and their captions."""

from pretrain.data.coco import load_coco_captions
from pretrain.data.formats import (
    FORMATS,
    IMAGES_ALONE,
    KEYED_FORMATS,
    SPLIT_FORMATS,
    Source,
    load_records,
)
from pretrain.data.mixture import MixedRecords
from pretrain.data.records import CaptionRecord, Records, caption_counts
from pretrain.data.subset import take_fraction

__all__ = [
    "FORMATS",
    "IMAGES_ALONE",
    "KEYED_FORMATS",
    "SPLIT_FORMATS",
    "CaptionRecord",
    "MixedRecords",
    "Records",
    "Source",
    "caption_counts",
    "load_coco_captions",
    "load_records",
    "take_fraction",
]
