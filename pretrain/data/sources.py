"""From the config's DATA keys to the data of a run: which sources, which part of them."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.data import loader
from pretrain.data.formats import IMAGES_ALONE, KEYED_FORMATS, SPLIT_FORMATS, Source, load_records
from pretrain.data.lanes import Plan
from pretrain.data.order import quotas
from pretrain.data.records import (
    CaptionRecord,
    MixedRecords,
    Records,
    caption_counts,
    check_subset,
    take_fraction,
)
from pretrain.data.shards import is_pipe, list_shards
from pretrain.data.stream import ImageStream, StreamLoader
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """What a run trains and validates on."""

    samples: loader.Samples  # of both sets
    train: loader.TrainSet | None  # None to evaluate only
    val: loader.ValSet | None
    stream: ImageStream | None = None  # where `train` gets its images from, if it has no records

    def train_loader(self, cfg: CfgNode, start_iteration: int) -> loader.ImageLoader | StreamLoader:
        """Endless training batches of this process, from an iteration on."""
        pin = cfg.MODEL.DEVICE.startswith("cuda")
        sizes = (cfg.SOLVER.IMS_PER_BATCH, start_iteration, cfg.DATA.NUM_WORKERS, pin)
        if self.stream is not None:
            return StreamLoader(self.train, self.stream, *sizes)
        return loader.build_train_loader(self.train, *sizes)

    def val_loader(self, cfg: CfgNode) -> loader.ImageLoader:
        """This process's share of the validation samples."""
        pin = cfg.MODEL.DEVICE.startswith("cuda")
        return loader.build_val_loader(self.val, cfg.TEST.IMS_PER_BATCH, cfg.DATA.NUM_WORKERS, pin)

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must find again. Data may have moved: no paths, but numbers."""
        own = {"outputs": self.samples.num_outputs, "read from pipes": self.stream is not None}
        if self.train is not None and self.stream is None:
            own["training images"] = len(self.train.records)
            own["training captions"] = int(caption_counts(self.train.records).sum())
        return {**self.samples.identity(), **own}


def open_data(
    cfg: CfgNode,
    build_samples: Callable[[CfgNode, Sequence | None, Sequence], loader.Samples],
    with_training_data: bool = True,
    own_records: Callable[[CfgNode, bool], Sequence[CaptionRecord] | None] = lambda *_: None,
) -> Data:
    """Open what the config names.

    Args:
        build_samples, own_records: of `pretrain.methods.method.Method`.
        with_training_data: False to evaluate only; then no training data is opened.
    """
    plan = None
    train = own_records(cfg, True) if with_training_data else []
    if train is None:
        plan = stream_plan(cfg)
        train = None if plan else training_records(cfg)
    val = own_records(cfg, False)
    if val is None:
        val = validation_records(cfg) if has_validation(cfg) or not with_training_data else []
    samples = build_samples(cfg, train, val)
    return Data(
        samples,
        loader.TrainSet(train or [], samples, cfg.SEED) if with_training_data else None,
        loader.ValSet(val, samples, cfg.SEED) if val else None,
        None if plan is None else ImageStream(plan),
    )


def training_records(cfg: CfgNode) -> Sequence[CaptionRecord]:
    """What DATA.TRAIN_SOURCES, or else DATA.TRAIN_CAPTIONS, name; of that, DATA.FRACTION."""
    weights, sources = training_sources(cfg)
    parts = [_subset(cfg, source, _load(source, "DATA.FORMAT")) for source in sources]
    if len(parts) == 1:
        return parts[0]
    for source, quota in zip(sources, quotas(weights)):
        logger.info("%s: %.1f %% of the training samples.", source.name, quota / 10)
    return MixedRecords(parts, weights)


def stream_plan(cfg: CfgNode) -> Plan | None:
    """How to read the training data, where it comes from pipes; None where it does not."""
    data = cfg.DATA
    _, sources = training_sources(cfg)
    shards = [source for source in sources if source.format == "webdataset"]
    piped = [source for source in shards if is_pipe(list_shards(source.captions)[0])]
    if not piped:
        return None
    name = piped[0].captions
    if len(sources) > 1:
        raise InputError(
            f"DATA.TRAIN_SOURCES: {name} is read from pipes and cannot be mixed with other "
            "sources. Give it alone, or download the shards."
        )
    if data.STREAM_LANES < 1 or data.STREAM_BLOCK < 1:
        raise InputError(
            f"DATA.STREAM_LANES {data.STREAM_LANES} and DATA.STREAM_BLOCK {data.STREAM_BLOCK} must "
            "be 1 or more."
        )
    check_subset(data.FRACTION, data.CAPTIONS_PER_IMAGE)
    shards = list_shards(name)
    lanes = min(data.STREAM_LANES, len(shards))
    logger.info("%s: %d shards, read in %d lanes.", name, len(shards), lanes)
    return Plan(
        tuple(shards),
        lanes,
        data.STREAM_BLOCK,
        cfg.SEED,
        data.FRACTION,
        data.CAPTIONS_PER_IMAGE,
        data.SUBSET_SEED,
        data.CAPTION_KEY,
    )


def has_validation(cfg: CfgNode) -> bool:
    """Whether the config names validation data."""
    alone = (cfg.DATA.VAL_FORMAT or cfg.DATA.FORMAT) == IMAGES_ALONE
    return bool(cfg.DATA.VAL_IMAGES if alone else cfg.DATA.VAL_CAPTIONS)


def validation_records(cfg: CfgNode) -> Sequence[CaptionRecord]:
    """What DATA.VAL_CAPTIONS names, or of images alone DATA.VAL_IMAGES; all of it."""
    data = cfg.DATA
    if not has_validation(cfg):
        raise InputError(
            "DATA.VAL_CAPTIONS is empty: name the annotation file, and DATA.VAL_IMAGES its folder "
            f"of images (of DATA.FORMAT {IMAGES_ALONE} the latter alone)."
        )
    source_format = data.VAL_FORMAT or data.FORMAT
    source = _source(cfg, source_format, data.VAL_CAPTIONS, data.VAL_IMAGES, data.VAL_SPLIT)
    return _load(source, "DATA.VAL_FORMAT" if data.VAL_FORMAT else "DATA.FORMAT")


def training_sources(cfg: CfgNode) -> tuple[list[float], list[Source]]:
    """Weight and place of each training source."""
    data = cfg.DATA
    if not data.TRAIN_SOURCES:
        if not data.TRAIN_CAPTIONS and data.FORMAT != IMAGES_ALONE:
            raise InputError(
                "DATA.TRAIN_CAPTIONS is empty: name the annotation file, and DATA.TRAIN_IMAGES "
                f"its folder of images (of DATA.FORMAT {IMAGES_ALONE} the latter alone)."
            )
        source = _source(cfg, data.FORMAT, data.TRAIN_CAPTIONS, data.TRAIN_IMAGES, data.TRAIN_SPLIT)
        return [1.0], [source]
    weights, sources = [], []
    for number, entry in enumerate(data.TRAIN_SOURCES):
        if not _is_source(entry):
            raise InputError(
                f"DATA.TRAIN_SOURCES[{number}]: expected [weight, format, captions, images] with a "
                f"number and texts, and perhaps a split, found {entry!r}."
            )
        weight, source_format, captions, images, *split = entry
        default = data.TRAIN_SPLIT if source_format in SPLIT_FORMATS else ""
        weights.append(weight)
        sources.append(_source(cfg, source_format, captions, images, *(split or [default])))
    return weights, sources


def _is_source(entry: object) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) in (4, 5)
        and isinstance(entry[0], int | float)
        and all(isinstance(part, str) for part in entry[1:])
    )


def _source(cfg: CfgNode, source_format: str, captions: str, images: str, split: str) -> Source:
    index_dir = cfg.DATA.INDEX_DIR or cfg.OUTPUT_DIR
    key = cfg.DATA.CAPTION_KEY if source_format in KEYED_FORMATS else ""
    share = cfg.DATA.MAX_SKIPPED_SHARE
    return Source(source_format, captions, images, split, index_dir, share, key)


def _load(source: Source, key: str) -> Records:
    turns = _main_process_first() if source.format == "webdataset" else contextlib.nullcontext()
    with turns:
        records = load_records(source, key)
    logger.info("%s: %d images, %d captions.", source.name, len(records), records.num_captions)
    return records


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """The main process writes an index of shards, the others find it written."""
    if not comm.is_main_process():
        comm.synchronize()
    try:
        yield
    finally:  # also on an error, which the others then meet as well
        if comm.is_main_process():
            comm.synchronize()


def _subset(cfg: CfgNode, source: Source, records: Records) -> Records:
    data = cfg.DATA
    chosen = take_fraction(records, data.FRACTION, data.CAPTIONS_PER_IMAGE, data.SUBSET_SEED)
    if chosen is not records:
        logger.info(
            "%s: of these, %d images and %d captions (DATA.FRACTION %g, DATA.CAPTIONS_PER_IMAGE "
            "%d, DATA.SUBSET_SEED %d).",
            source.name,
            len(chosen),
            chosen.num_captions,
            data.FRACTION,
            data.CAPTIONS_PER_IMAGE,
            data.SUBSET_SEED,
        )
    return chosen
