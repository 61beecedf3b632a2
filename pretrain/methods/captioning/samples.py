"""From captioned images to samples of tokens; what a model would reach that sees no image."""

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.data.loader import (
    Samples,
    ValSet,
    Visit,
)
from pretrain.data.order import Stream
from pretrain.data.records import CaptionRecord, caption_counts
from pretrain.methods.captioning.tokenizer import (
    SPECIAL_PIECES,
    Tokenizer,
    merge_warning,
    train_tokenizer,
)
from pretrain.methods.classification.labels import entropy, entropy_of_labels
from virtex_d2.engine.checkpointer import has_checkpoint
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


class CaptionTarget(Protocol):
    """What an objective wants besides the caption; `stream`: where its random numbers are from."""

    stream: Stream

    def __call__(self, tokens: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """(T,) int64 -> further parts of the sample."""


class CaptionSamples(Samples):
    """Views of images with a caption drawn at each visit; in validation every caption.

    A sample has, besides image and jitter,
        caption_tokens   (T,) int64: [SOS] pieces [EOS], T <= MODEL.TEXTUAL.MAX_LENGTH; a caption
                         that is too long loses its end and keeps its [EOS]
        caption_lengths  () int64: T
    and what `targets` add.
    """

    padding = dict.fromkeys(("caption_tokens", "masked_tokens", "masked_labels"), Tokenizer.pad_id)

    def __init__(self, cfg: CfgNode, tokenizer: Tokenizer, targets: Sequence[CaptionTarget] = ()):
        super().__init__(cfg)
        self.tokenizer = tokenizer
        self.max_length = cfg.MODEL.TEXTUAL.MAX_LENGTH
        self.targets = targets
        self.num_outputs = tokenizer.vocab_size
        if self.max_length < 3:
            raise InputError(
                f"MODEL.TEXTUAL.MAX_LENGTH {self.max_length}: a caption has [SOS], [EOS] and at "
                "least one piece; use 3 or more."
            )

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        rng = visit.rng()
        caption = visit.record.captions[rng.integers(len(visit.record.captions))]
        # a view that is mirrored exchanges left and right in the caption
        pixels, caption, jitter = self.train_view(visit.image, caption, rng)
        return {"image": pixels, "jitter": jitter, **self._words(caption, visit)}

    def val(self, visit: Visit) -> list[dict[str, torch.Tensor]]:
        (view,) = super().val(visit)
        captions = enumerate(visit.record.captions)
        return [{**view, **self._words(caption, visit, number)} for number, caption in captions]

    def val_counts(self, records: Sequence[CaptionRecord]) -> np.ndarray:
        return caption_counts(records)

    def _words(self, caption: str, visit: Visit, number: int = 0) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(self.encode(caption))
        words = {"caption_tokens": tokens, "caption_lengths": torch.tensor(len(tokens))}
        for target in self.targets:
            words |= target(tokens, visit.rng(target.stream, number))
        return words

    def encode(self, caption: str) -> list[int]:
        """[SOS] pieces [EOS], at most `max_length` of them."""
        pieces = self.tokenizer.encode(caption)[: self.max_length - 2]
        return [self.tokenizer.sos_id, *pieces, self.tokenizer.eos_id]

    def identity(self) -> dict[str, str]:
        return tokenizer_identity(self.tokenizer)


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """What tells a vocabulary from others of its size."""
    return {"the tokenizer's sha256": tokenizer.sha256[:12]}


class MaskedWords:
    """Hides words: `masked_tokens` (T,) and `masked_labels` (T,), padding where nothing is hidden.

    Chosen are `share` of the caption's pieces, rounded up, never [SOS] or [EOS]; each becomes
    [MASK], a random piece, or stays (VirTex's released code, after BERT).
    """

    stream = Stream.MASKED_WORDS

    def __init__(self, vocab_size: int, share: float, mask_prob: float, random_prob: float):
        if not (0 < share <= 1 and mask_prob >= 0 <= random_prob and mask_prob + random_prob <= 1):
            raise InputError(
                f"MODEL.MASKED_LM: expected 0 < SHARE <= 1 and MASK_PROB + RANDOM_PROB <= 1, found "
                f"SHARE {share}, MASK_PROB {mask_prob}, RANDOM_PROB {random_prob}."
            )
        self._vocab_size = vocab_size
        self._share = share
        self._mask_prob = mask_prob
        self._random_prob = random_prob

    def __call__(self, tokens: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        masked, labels = tokens.clone(), torch.full_like(tokens, Tokenizer.pad_id)
        num_pieces = len(tokens) - 2
        chosen = rng.permutation(num_pieces)[: math.ceil(self._share * num_pieces)]
        for place in 1 + chosen:
            labels[place] = tokens[place]
            fate = rng.random()
            if fate < self._mask_prob:
                masked[place] = Tokenizer.mask_id
            elif fate < self._mask_prob + self._random_prob:
                masked[place] = int(rng.integers(len(SPECIAL_PIECES), self._vocab_size))
        return {"masked_tokens": masked, "masked_labels": labels}


class ParallelPrediction:
    """Draws whether the caption is predicted all at once: `parallel`, a bool."""

    stream = Stream.PARALLEL_PREDICTION

    def __init__(self, share: float):
        self._share = share

    def __call__(self, tokens: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"parallel": torch.tensor(rng.random() < self._share)}


def build_caption_samples(
    cfg: CfgNode,
    train: Sequence[CaptionRecord] | None,
    val: Sequence[CaptionRecord],
    targets: Callable[[CfgNode, int], Sequence[CaptionTarget]] = lambda cfg, vocab_size: (),
) -> CaptionSamples:
    """Samples of captioned records.

    Args:
        cfg, train, val: as of `Method.build_samples`.
        targets: config and number of pieces -> what is drawn for each caption.
    """
    for records, split in ((train, "TRAIN"), (val, "VAL")):
        if silent := int((caption_counts(records or []) == 0).sum()):
            raise InputError(
                f"DATA.{split}_IMAGES: {silent} of {len(records)} images have no caption, and "
                f"MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE} learns from captions. Name a DATA.FORMAT "
                "that has them."
            )
    tokenizer = load_or_train_tokenizer(cfg, train)
    return CaptionSamples(cfg, tokenizer, targets(cfg, tokenizer.vocab_size))


def load_or_train_tokenizer(cfg: CfgNode, records: Sequence[CaptionRecord] | None) -> Tokenizer:
    """DATA.TOKENIZER, else that of OUTPUT_DIR's checkpoint, else one trained on the captions.

    A vocabulary that is there already is used as it was learned, with or without accents.
    """
    if cfg.DATA.TOKENIZER:
        return _as_learned(cfg, cfg.DATA.TOKENIZER)
    if records is None:
        raise InputError(
            f"DATA.TOKENIZER is empty: {cfg.DATA.TRAIN_CAPTIONS} is read from pipes, which have no "
            "end to train a tokenizer on. Name one."
        )
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


@functools.lru_cache(maxsize=1)  # every caption is read for it
def unigram_entropy(images: ValSet) -> float:
    """Entropy in nats of the tokens that are predicted (all but [SOS]).

    The loss of a captioner that knows the frequencies of words and nothing else.
    """
    counts: Counter[int] = Counter()
    for tokens in _encoded(images):
        counts.update(tokens[1:])
    counts.pop(images.samples.tokenizer.pad_id, None)  # <unk> is padding: the loss passes over it
    return entropy(counts)


@functools.lru_cache(maxsize=1)
def entropy_of_words(images: ValSet) -> float:
    """Loss in nats of the best answer that is the same for every image, of its words as a set."""
    return entropy_of_labels(
        {token for token in tokens if token >= len(SPECIAL_PIECES)} for tokens in _encoded(images)
    )


def _encoded(images: ValSet) -> Iterator[list[int]]:
    for record in images.records:
        for caption in record.captions:
            yield images.samples.encode(caption)
