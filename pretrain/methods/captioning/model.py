"""What a backbone learns from captions: `pretrain.methods.method.Method`s on

    batch["image"]            (N, 3, H, W) float, normalised
    batch["caption_tokens"]   (N, T) int64: [SOS] words [EOS] padding
    batch["caption_lengths"]  (N,) int64: tokens of each caption without padding

and what `pretrain.methods.captioning.samples` adds for some:

    batch["masked_tokens"]    (N, T) int64: the caption with some words hidden
    batch["masked_labels"]    (N, T) int64: the hidden words where they were, padding elsewhere
    batch["parallel"]         (N,) bool: whose caption is predicted all at once

What packs words takes their places from the batch too, as `places(batch)` makes them on the host.
They may be missing: to make them then reads lengths back from the device, which keeps the host
waiting.

A loss is a mean in nats. In evaluation mode it is the plain cross entropy, without smoothing.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from pretrain.data.loader import ValSet
from pretrain.data.records import CaptionRecord
from pretrain.methods.captioning.pictures import caption_pictures
from pretrain.methods.captioning.samples import (
    CaptionSamples,
    CaptionTarget,
    MaskedWords,
    ParallelPrediction,
    build_caption_samples,
    entropy_of_words,
    unigram_entropy,
)
from pretrain.methods.captioning.textual_head import (
    PADDING,
    TextualHead,
    Words,
    places,
    word_places,
)
from pretrain.methods.captioning.tokenizer import SPECIAL_PIECES, Tokenizer
from pretrain.methods.classification.classifier import (
    LinearHead,
    MultilabelClassification,
    label_loss,
    refuse_additions,
)
from pretrain.methods.method import Batch, Method, build_visual
from virtex_d2.engine.errors import InputError


def reverse_captions(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(N, T) -> (N, T): each row's first `lengths` tokens reversed, padding behind them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mirrored = lengths.unsqueeze(1) - 1 - positions
    return tokens.gather(1, torch.where(mirrored >= 0, mirrored, positions))


class _OfWords(Method):
    """What predicts words of a caption with a decoder: the parts that are alike."""

    in_passes = True

    @staticmethod
    def targets(cfg: CfgNode, vocab_size: int) -> list[CaptionTarget]:
        """What is drawn for each caption."""
        return []

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> CaptionSamples:
        return build_caption_samples(cfg, train, val, cls.targets)

    def places(self, batch: Batch) -> Batch:
        """Indices that packing takes, made on the host."""
        raise NotImplementedError

    def prepare(self, batch: dict) -> Batch:
        return super().prepare({**batch, **self.places(batch)})

    def placed(self, batch: Batch) -> Batch:
        """The batch with `places` of it."""
        if "word_places" in batch:
            return batch
        device = batch["caption_tokens"].device
        return {key: index.to(device) for key, index in self.places(batch).items()}

    def summarize(self, means: Mapping[str, float], val: ValSet) -> dict[str, float]:
        perplexities = {
            name.replace("loss", "perplexity", 1): math.exp(min(means[name], 50.0))
            for name in self.losses
            if name in means
        }
        return {**perplexities, "unigram_entropy": unigram_entropy(val)}


class Captioning(_OfWords):
    """Predict every next token of the caption, forward and backward.

    VirTex, section 3.1: two decoders share projection, embeddings and output layer; the loss of a
    direction is the mean cross entropy over predicted tokens, padding ignored; the two are summed.

    Attributes:
        directions: the first one's head is `textual`; a second one's is `backward_textual`, as
            VirTex's checkpoints name them.
        label_smoothing: share of a target's probability that is spread over all words.
        classification_weight: weight of an auxiliary token classification; 0 is none.
    """

    directions: tuple[str, ...] = ("forward", "backward")

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        self.losses = tuple(f"loss_captioning_{direction}" for direction in self.directions)
        self.label_smoothing = cfg.MODEL.CAPTIONING.LABEL_SMOOTHING
        self.classification_weight = cfg.MODEL.CAPTIONING.CLASSIFICATION_WEIGHT
        head, size = _head_options(cfg), self.visual.feature_size
        self.textual = TextualHead(size, num_outputs, **head)
        if len(self.directions) == 2:
            self.backward_textual = TextualHead(size, num_outputs, **head, share_with=self.textual)
        if self.classification_weight:
            self.classification = LinearHead(size, num_outputs)

    @staticmethod
    def check(cfg: CfgNode) -> None:
        for key in ("LABEL_SMOOTHING", "PARALLEL_SHARE"):
            if not 0 <= (share := cfg.MODEL.CAPTIONING[key]) <= 1:
                raise InputError(f"MODEL.CAPTIONING.{key} {share}: expected a share from 0 to 1.")

    @staticmethod
    def targets(cfg: CfgNode, vocab_size: int) -> list[CaptionTarget]:
        share = cfg.MODEL.CAPTIONING.PARALLEL_SHARE
        return [ParallelPrediction(share)] if share > 0 else []

    def forward(self, batch: Batch) -> Batch:
        features = self.visual(batch["image"])  # (N, C, h, w)
        losses = self._caption_losses(self.textual.project(features), batch)
        if self.classification_weight and self.training:
            labels = token_labels(batch["caption_tokens"], self.classification.output.out_features)
            loss = label_loss(self.classification(features), labels)
            losses["loss_classification"] = self.classification_weight * loss
        return losses

    def count(self, batch: Batch) -> int:
        """Tokens that a direction predicts: all but the first and the padding."""
        return int((batch["caption_tokens"][:, 1:] != PADDING).sum())

    def places(self, batch: Batch) -> Batch:
        """Of the words that a direction reads: all but the last."""
        length = batch["caption_tokens"].shape[1] - 1
        return {"word_places": word_places(batch["caption_lengths"] - 1, length)}

    def _caption_losses(self, visual_tokens: torch.Tensor, batch: Batch) -> Batch:
        """Of each direction the mean cross entropy, in nats, of tokens 1.. given those before them.

        Rows in `batch["parallel"]` see no word at all: parallel prediction (CapPa: Tschannen et
        al., arXiv 2306.07915, section 3.2). Every input is [MASK] and there is no causal mask, so
        that all words must come from the image. Unlike there, a row knows how long its caption is:
        a loss must not depend on the longest of the batch.
        """
        tokens, lengths = batch["caption_tokens"], batch["caption_lengths"]
        heads = [self.textual, *([self.backward_textual] if len(self.directions) == 2 else [])]
        sequences = torch.stack(
            [
                reverse_captions(tokens, lengths) if direction == "backward" else tokens
                for direction in self.directions
            ],
            dim=-1,
        )  # (N, T, D)
        index = self.placed(batch)["word_places"]
        words = Words((len(tokens), tokens.shape[1] - 1), lengths - 1, index)
        inputs = words.pack(sequences[:, :-1]).T  # (D, P)
        targets = words.pack(sequences[:, 1:]).T
        # validation predicts next words only: that all mixes can be compared by
        parallel = batch.get("parallel") if self.training else None
        if parallel is not None:
            blind = words.pack(parallel.unsqueeze(1).expand(words.shape))  # (P,)
            inputs = inputs.masked_fill(blind, Tokenizer.mask_id)

        # what the directions share is computed for both at once
        embedded = self.textual.embedding(inputs, words.positions)  # (D, P, H)
        hidden = torch.cat(
            [
                head.hidden_states(x, visual_tokens, words, parallel)
                for head, x in zip(heads, embedded)
            ]
        )
        logits = self.textual.output(hidden).float().unflatten(0, targets.shape)  # (D, P, V)
        smoothing = self.label_smoothing if self.training else 0.0
        return {
            name: F.cross_entropy(of_words, target, ignore_index=PADDING, label_smoothing=smoothing)
            for name, of_words, target in zip(self.losses, logits, targets)
        }

    @property
    def can_caption(self) -> bool:
        """Whether it predicts a caption's words one after the other, from the first."""
        return self.directions[0] == "forward"

    def pictures(self, val: ValSet, count: int) -> list[tuple[str, np.ndarray]]:
        """Images with their greedy caption, the same ones every time."""
        if not self.can_caption:
            return []
        images = (val.of_image(index)[0][:1] for index in range(min(count, len(val.records))))
        samples = [sample for of_image in images for sample in of_image]
        return caption_pictures(self, val.samples.tokenizer, samples)


class ForwardCaptioning(Captioning):
    """Predict every next token of the caption."""

    directions = ("forward",)


class BackwardCaptioning(Captioning):
    """Predict every token from those behind it."""

    directions = ("backward",)


class MaskedLanguageModel(_OfWords):
    """Predict words that are hidden in the caption, from all the others and the image.

    VirTex (section 4, ablation of tasks) and the released code: BERT's task; the loss is the mean
    cross entropy over the chosen words.
    """

    losses = ("loss_masked_lm",)

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        self.textual = TextualHead(self.visual.feature_size, num_outputs, **_head_options(cfg))

    @staticmethod
    def check(cfg: CfgNode) -> None:
        refuse_additions(cfg)

    @staticmethod
    def targets(cfg: CfgNode, vocab_size: int) -> list[CaptionTarget]:
        masked = cfg.MODEL.MASKED_LM
        return [MaskedWords(vocab_size, masked.SHARE, masked.MASK_PROB, masked.RANDOM_PROB)]

    def forward(self, batch: Batch) -> Batch:
        visual_tokens = self.textual.project(self.visual(batch["image"]))  # (N, S, H)
        tokens, lengths = batch["masked_tokens"], batch["caption_lengths"]
        placed = self.placed(batch)
        words = Words(tuple(tokens.shape), lengths, placed["word_places"])
        embedded = self.textual.embedding(words.pack(tokens), words.positions)
        both_ways = torch.ones_like(lengths, dtype=torch.bool)
        hidden = self.textual.hidden_states(embedded, visual_tokens, words, both_ways)  # (P, H)
        # the output layer is the widest there is: spend it on what is predicted
        chosen = placed["chosen_rows"]
        labels = words.pack(batch["masked_labels"])[chosen]
        logits = self.textual.output(hidden[chosen]).float()  # (chosen words, V)
        # not the mean, which of nothing is NaN: captions without words have nothing to hide
        total = F.cross_entropy(logits, labels, ignore_index=PADDING, reduction="sum")
        return {"loss_masked_lm": total / (labels != PADDING).sum().clamp(min=1)}

    def places(self, batch: Batch) -> Batch:
        """Of the caption's words, and which rows of these are predicted."""
        labels = batch["masked_labels"].cpu().numpy()
        index = word_places(batch["caption_lengths"], labels.shape[1])
        chosen = labels.ravel()[index.numpy()] != PADDING
        return {"word_places": index, "chosen_rows": places(chosen)}

    def count(self, batch: Batch) -> int:
        """Words that are predicted."""
        return int((batch["masked_labels"] != PADDING).sum())


class TokenClassification(MultilabelClassification):
    """Predict the words of the caption, as a set: its pieces once, without special ones."""

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> CaptionSamples:
        return build_caption_samples(cfg, train, val)

    def labels(self, batch: Batch) -> torch.Tensor:
        return token_labels(batch["caption_tokens"], self.textual.output.out_features)

    def summarize(self, means: Mapping[str, float], val: ValSet) -> dict[str, float]:
        return {"label_entropy": entropy_of_words(val)}


def token_labels(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(N, T) -> (N, V) bool: the pieces that a caption has, without the special ones."""
    labels = torch.zeros(len(tokens), vocab_size, dtype=torch.bool, device=tokens.device)
    labels.scatter_(1, tokens, True)
    labels[:, : len(SPECIAL_PIECES)] = False
    return labels


def _head_options(cfg: CfgNode) -> dict:
    textual = cfg.MODEL.TEXTUAL
    width = textual.HIDDEN_SIZE
    heads = textual.ATTENTION_HEADS or max(1, width // 64)
    if width % heads:
        raise InputError(
            f"MODEL.TEXTUAL.HIDDEN_SIZE {width} is not a multiple of its {heads} attention heads: "
            "set MODEL.TEXTUAL.ATTENTION_HEADS to a divisor."
        )
    if textual.NORM not in ("post", "pre"):
        raise InputError(f'MODEL.TEXTUAL.NORM: expected "post" or "pre", found {textual.NORM!r}.')
    return {
        "hidden_size": width,
        "num_layers": textual.NUM_LAYERS,
        "attention_heads": heads,
        "feedforward_size": textual.FEEDFORWARD_SIZE or 4 * width,
        "dropout": textual.DROPOUT,
        "max_length": textual.MAX_LENGTH,
        "norm": textual.NORM,
    }
