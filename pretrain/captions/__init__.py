"""Annotations in any of `FORMATS` -> packed records of images and their captions."""

from .coco import load_coco_captions
from .formats import FORMATS, KEYED_FORMATS, SPLIT_FORMATS, Source, load_records
from .mixture import MixedRecords
from .records import CaptionRecord, Records, caption_counts
from .subset import take_fraction

__all__ = [
    "FORMATS",
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
