"""The formats of captions by name, and where each reader finds what it needs."""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.data.coco import load_coco_captions
from pretrain.data.flickr import load_flickr_captions
from pretrain.data.folder import load_folder_captions, load_images
from pretrain.data.karpathy import load_karpathy_captions
from pretrain.data.records import Records
from pretrain.data.shards import load_shards
from pretrain.data.tables import load_csv_captions, load_tsv_captions
from virtex_d2.engine.errors import InputError, nearest


@dataclass(frozen=True)
class Source:
    """Where captions and images are.

    Attributes:
        format: a name in `FORMATS`.
        captions: the annotation file; for "folder" the folder of texts, for "webdataset" shards.
        images: the folder that the annotations' image paths are relative to.
        split: which part, in the formats of `SPLIT_FORMATS`.
        index_dir: where an index of shards is kept.
        max_skipped_share: the fraction of shards' samples that may be unusable.
        caption_key: where captions are, in the formats of `KEYED_FORMATS`; "" is where they
            usually are.
    """

    format: str
    captions: str
    images: str = ""
    split: str = ""
    index_dir: str = "."
    max_skipped_share: float = 0.01
    caption_key: str = ""

    @property
    def name(self) -> str:
        """The path that tells it from others in messages."""
        return self.captions or self.images


IMAGES_ALONE = "images"  # a folder of images, of which nothing is said

# A reader for each format.
FORMATS: dict[str, Callable[[Source], Records]] = {
    "coco": lambda s: load_coco_captions(s.captions, s.images),
    "karpathy": lambda s: load_karpathy_captions(s.captions, s.images, s.split),
    "flickr": lambda s: load_flickr_captions(s.captions, s.images, s.split, s.caption_key),
    "csv": lambda s: load_csv_captions(s.captions, s.images, s.caption_key),
    "tsv": lambda s: load_tsv_captions(s.captions, s.images, s.caption_key),
    "folder": lambda s: load_folder_captions(s.captions, s.images),
    "webdataset": lambda s: load_shards(
        s.captions, s.index_dir, s.max_skipped_share, s.caption_key
    ),
    IMAGES_ALONE: lambda s: load_images(s.images),
}
# Those whose annotations hold several splits.
SPLIT_FORMATS = ("karpathy", "flickr")
# Those in which the caption's column or key can be named.
KEYED_FORMATS = ("flickr", "csv", "tsv", "webdataset")


def load_records(source: Source, key: str = "DATA.FORMAT") -> Records:
    """Read a source's annotations.

    Args:
        source: what to read.
        key: the config key that names the format, for messages.
    """
    if source.format not in FORMATS:
        raise InputError(
            f"{key}: {source.format!r} is not one of {', '.join(FORMATS)}."
            + nearest(str(source.format), FORMATS)
        )
    if source.split and source.format not in SPLIT_FORMATS:
        raise InputError(
            f"{source.captions}: the split {source.split!r} was asked for, but the format "
            f"{source.format} has no splits, only {' and '.join(SPLIT_FORMATS)} have. Leave "
            "DATA.TRAIN_SPLIT or DATA.VAL_SPLIT empty."
        )
    if source.caption_key and source.format not in KEYED_FORMATS:
        raise InputError(
            f"{source.captions}: the key {source.caption_key!r} was asked for, but of the format "
            f"{source.format} no other is read. Those with keys are {', '.join(KEYED_FORMATS)}."
        )
    return FORMATS[source.format](source)
