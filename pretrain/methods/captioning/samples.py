"""What a run trains and validates on, as its config says."""

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.data import CaptionRecord
from pretrain.data.loader import CaptionDataset, CaptionLoader, build_train_loader
from pretrain.data.sources import stream_plan, training_records, validation_records
from pretrain.data.stream import CaptionStream, StreamLoader
from pretrain.methods.captioning.baselines import label_entropy, unigram_entropy
from pretrain.methods.captioning.targets import sample_targets
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.methods.captioning.vocabulary import merge_warning
from pretrain.methods.classification.labels import ImageLabels, check_same_classes
from pretrain.transforms import EvalTransform, TrainTransform
from virtex_d2.engine.checkpointer import has_checkpoint
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class PretrainData:
    """Data sets of a run.

    Attributes:
        tokenizer: of both data sets.
        train, val: None where there is none.
        val_labels: classes of the validation images, for an objective on labels.
        num_outputs: what an objective predicts among: pieces, or classes.
        stream: where `train` gets its samples from, if it has no records.
    """

    tokenizer: Tokenizer
    train: CaptionDataset | None
    val: CaptionDataset | None
    val_labels: ImageLabels | None
    num_outputs: int
    stream: CaptionStream | None = None

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """Of the validation captions, in nats: `pretrain.methods.captioning.baselines`."""
        return unigram_entropy(self.val)

    @functools.cached_property
    def label_entropy(self) -> float:
        """Of the validation images' classes, or of the words of their captions, in nats."""
        return label_entropy(self.val, self.val_labels)

    def train_loader(self, cfg: CfgNode, start_iteration: int) -> CaptionLoader | StreamLoader:
        """Endless training batches of this process, from an iteration on."""
        pin = cfg.MODEL.DEVICE.startswith("cuda")
        sizes = (cfg.SOLVER.IMS_PER_BATCH, start_iteration, cfg.DATA.NUM_WORKERS, pin)
        if self.stream is not None:
            return StreamLoader(self.train, self.stream, *sizes)
        return build_train_loader(self.train, *sizes)


def build_data(cfg: CfgNode, with_training_data: bool = True) -> PretrainData:
    """Open what the config names; a tokenizer is trained where there is none.

    Args:
        cfg: of `pretrain.config.get_pretrain_cfg`.
        with_training_data: False to evaluate only; then DATA.TRAIN_CAPTIONS is not opened.
    """
    plan = stream_plan(cfg) if with_training_data else None
    train = training_records(cfg) if with_training_data and plan is None else []
    val = validation_records(cfg) if cfg.DATA.VAL_CAPTIONS or not with_training_data else []
    tokenizer = load_or_train_tokenizer(cfg, train)
    num_outputs = tokenizer.vocab_size
    train_labels = val_labels = None
    if cfg.MODEL.OBJECTIVE == "multilabel_classification":
        train_labels = _labels(cfg, "TRAIN", train) if train else None
        val_labels = _labels(cfg, "VAL", val) if val else None
        if train_labels and val_labels:
            check_same_classes(train_labels, val_labels, cfg.DATA.VAL_LABELS)
        num_outputs = len((train_labels or val_labels).class_names)

    def dataset(records, transform, labels) -> CaptionDataset:
        return CaptionDataset(
            records,
            tokenizer,
            transform,
            cfg.MODEL.TEXTUAL.MAX_LENGTH,
            cfg.SEED,
            sample_targets(cfg, tokenizer.vocab_size, labels),
        )

    return PretrainData(
        tokenizer,
        dataset(train, _train_transform(cfg), train_labels) if with_training_data else None,
        dataset(val, EvalTransform(cfg.DATA.IMAGE_SIZE), val_labels) if val else None,
        val_labels,
        num_outputs,
        None if plan is None else CaptionStream(plan),
    )


def load_or_train_tokenizer(cfg: CfgNode, records: Sequence[CaptionRecord]) -> Tokenizer:
    """DATA.TOKENIZER, else that of OUTPUT_DIR's checkpoint, else one trained on the captions.

    A vocabulary that is there already is used as it was learned, with or without accents.
    """
    if cfg.DATA.TOKENIZER:
        return _as_learned(cfg, cfg.DATA.TOKENIZER)
    path = os.path.join(cfg.OUTPUT_DIR, "tokenizer.model")
    if not (has_checkpoint(cfg.OUTPUT_DIR) and os.path.isfile(path)):
        if not records:
            raise InputError(
                f"{path}: expected the tokenizer of a checkpoint in this folder, found none. Give "
                "the one that the model was trained with as DATA.TOKENIZER."
            )
        if comm.is_main_process():  # also where a run that never saved left one behind
            captions = [caption for record in records for caption in record.captions]
            strip = cfg.DATA.STRIP_ACCENTS
            if strip and (warning := merge_warning(captions)):
                logger.warning(warning)
            train_tokenizer(captions, cfg.DATA.VOCAB_SIZE, path, strip)
        comm.synchronize()
    return _as_learned(cfg, path)


def _as_learned(cfg: CfgNode, path: str) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if cfg.DATA.STRIP_ACCENTS and not tokenizer.strips_accents:
        raise InputError(
            f"DATA.STRIP_ACCENTS True: {path} was learned from captions with their accents. Set it "
            "to False, or name a vocabulary that was learned without."
        )
    if tokenizer.strips_accents and not cfg.DATA.STRIP_ACCENTS:
        logger.info("%s is assumed to be learned without accents: captions lose theirs.", path)
    return tokenizer


def _labels(cfg: CfgNode, split: str, records: Sequence[CaptionRecord]) -> ImageLabels:
    path = cfg.DATA[f"{split}_LABELS"]
    if not path:
        raise InputError(
            f"DATA.{split}_LABELS is empty: multilabel_classification learns the classes of a COCO "
            f"instances file of the images of DATA.{split}_CAPTIONS."
        )
    labels = ImageLabels(path, (record.file_name for record in records))
    logger.log(
        logging.WARNING if labels.num_unlisted else logging.INFO,
        "%s: %d classes; %d of %d images have no label, %d of these are not in the file. Images "
        "without a label count for nothing in the loss.",
        path,
        len(labels.class_names),
        labels.num_unlabelled,
        len(labels),
        labels.num_unlisted,
    )
    return labels


def _train_transform(cfg: CfgNode) -> TrainTransform:
    data = cfg.DATA
    return TrainTransform(
        data.IMAGE_SIZE,
        scale=tuple(data.CROP_SCALE),
        ratio=tuple(data.CROP_RATIO),
        flip=data.FLIP_PROB,
        jitter=tuple(data.COLOR_JITTER),
        jitter_prob=data.COLOR_JITTER_PROB,
    )
