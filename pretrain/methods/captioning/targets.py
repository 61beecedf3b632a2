"""What an objective wants of a sample besides its image and caption, as a function of the position.

Each of these adds tensors to a sample: `extend(sample, index, rng)`, with the record's index and a
generator of its own that follows from (seed, position) alone.
"""

import math
from typing import Protocol

import numpy as np
import torch
from detectron2.config import CfgNode

from pretrain.data.order import Stream
from pretrain.methods.captioning.tokenizer import SPECIAL_PIECES, Tokenizer
from pretrain.methods.classification.labels import ImageLabels
from virtex_d2.engine.errors import InputError


class SampleTarget(Protocol):
    """`stream` is where its random numbers come from."""

    stream: Stream

    def extend(self, sample: dict, index: int, rng: np.random.Generator) -> None:
        """Add to `sample` (`pretrain.data.loader.CaptionDataset`'s, of record `index`)."""


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

    def extend(self, sample: dict, index: int, rng: np.random.Generator) -> None:
        tokens = sample["caption_tokens"]
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
        sample["masked_tokens"], sample["masked_labels"] = masked, labels


class ParallelPrediction:
    """Draws whether the caption is predicted all at once: `parallel`, a bool."""

    stream = Stream.PARALLEL_PREDICTION

    def __init__(self, share: float):
        self._share = share

    def extend(self, sample: dict, index: int, rng: np.random.Generator) -> None:
        sample["parallel"] = torch.tensor(rng.random() < self._share)


class LabelsOfImage:
    """Adds the image's classes: `labels` (K,) int64."""

    stream = Stream.IMAGE_LABELS

    def __init__(self, labels: ImageLabels):
        self._labels = labels

    def extend(self, sample: dict, index: int, rng: np.random.Generator) -> None:
        sample["labels"] = torch.from_numpy(self._labels[index])


def sample_targets(
    cfg: CfgNode, vocab_size: int, labels: ImageLabels | None
) -> tuple[SampleTarget, ...]:
    """What MODEL.OBJECTIVE wants of each sample."""
    if cfg.MODEL.OBJECTIVE == "masked_lm":
        masked = cfg.MODEL.MASKED_LM
        return (MaskedWords(vocab_size, masked.SHARE, masked.MASK_PROB, masked.RANDOM_PROB),)
    if cfg.MODEL.OBJECTIVE == "multilabel_classification":
        return (LabelsOfImage(labels),)
    if cfg.MODEL.CAPTIONING.PARALLEL_SHARE > 0:
        return (ParallelPrediction(cfg.MODEL.CAPTIONING.PARALLEL_SHARE),)
    return ()
