"""What a backbone learns from captions or labels: objectives behind one interface and one registry.

`forward(batch) -> {"loss_...": scalar tensor}` with

    batch["image"]            (N, 3, H, W) float, normalised
    batch["caption_tokens"]   (N, T) int64: [SOS] words [EOS] padding
    batch["caption_lengths"]  (N,) int64: tokens of each caption without padding

and what the objective's `inputs` name (`pretrain.methods.captioning.targets` makes it):

    batch["masked_tokens"]    (N, T) int64: the caption with some words hidden
    batch["masked_labels"]    (N, T) int64: the hidden words where they were, padding elsewhere
    batch["labels"]           (N, K) int64: classes of an image, behind them -1
    batch["parallel"]         (N,) bool: whose caption is predicted all at once

An objective that packs words takes the places of these from the batch too, as its
`places(batch)` makes them on the host. They may be missing: to make them then reads lengths back
from the device, which keeps the host waiting.

`losses` names what validation gets, `baseline` what of `samples.PretrainData` to hold it up
against. A loss is a mean in nats; `num_predictions(batch)` says over
how many items, so that means of batches can be averaged. In evaluation mode a loss is the plain
cross entropy, without smoothing.
"""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from pretrain.backbone import VisualBackbone
from pretrain.methods.captioning.textual_head import (
    PADDING,
    TextualHead,
    Words,
    places,
    word_places,
)
from pretrain.methods.captioning.tokenizer import SPECIAL_PIECES, Tokenizer
from virtex_d2.engine.errors import InputError, nearest

OBJECTIVES = Registry("OBJECTIVES")
OBJECTIVES.__doc__ = (
    "Pretraining objectives: `build(cfg, num_outputs) -> nn.Module`, by config name. `num_outputs` "
    "is the tokenizer's number of pieces, or for an objective on labels the number of classes."
)

Batch = dict[str, torch.Tensor]


def reverse_captions(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(N, T) -> (N, T): each row's first `lengths` tokens reversed, padding behind them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mirrored = lengths.unsqueeze(1) - 1 - positions
    return tokens.gather(1, torch.where(mirrored >= 0, mirrored, positions))


class Captioning(nn.Module):
    """Predict every next token of the caption, forward, backward or both.

    VirTex, section 3.1: two decoders share projection, embeddings and output layer; the loss of a
    direction is the mean cross entropy over predicted tokens, padding ignored; the two are summed.

    Args:
        visual: (N, 3, H, W) -> (N, C, h, w), with an attribute `feature_size` = C.
        vocab_size: pieces of the tokenizer.
        directions: "forward", "backward" or both. The first one's head is `textual`; a second one's
            is `backward_textual`, as VirTex's checkpoints name them.
        label_smoothing: share of a target's probability that is spread over all words.
        classification_weight: weight of an auxiliary `TokenClassification` loss; 0 is none.
        head: further arguments of `TextualHead`.
    """

    baseline = "unigram_entropy"

    def __init__(
        self,
        visual: VisualBackbone,
        vocab_size: int,
        directions: tuple[str, ...] = ("forward", "backward"),
        label_smoothing: float = 0.0,
        classification_weight: float = 0.0,
        **head,
    ):
        super().__init__()
        self.visual = visual
        self.directions = directions
        self.losses = tuple(f"loss_captioning_{direction}" for direction in directions)
        self.label_smoothing = label_smoothing
        self.classification_weight = classification_weight
        self.textual = TextualHead(visual.feature_size, vocab_size, **head)
        if len(directions) == 2:
            self.backward_textual = TextualHead(
                visual.feature_size, vocab_size, **head, share_with=self.textual
            )
        if classification_weight:
            self.classification = LinearHead(visual.feature_size, vocab_size)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        features = self.visual(batch["image"])  # (N, C, h, w)
        losses = self._caption_losses(self.textual.project(features), batch)
        if self.classification_weight and self.training:
            labels = token_labels(batch["caption_tokens"], self.classification.output.out_features)
            loss = label_loss(self.classification(features), labels)
            losses["loss_classification"] = self.classification_weight * loss
        return losses

    def num_predictions(self, batch: Batch) -> int:
        """Tokens that a direction predicts: all but the first and the padding."""
        return int((batch["caption_tokens"][:, 1:] != PADDING).sum())

    def places(self, batch: Batch) -> Batch:
        """Of the words that a direction reads: all but the last."""
        length = batch["caption_tokens"].shape[1] - 1
        return {"word_places": word_places(batch["caption_lengths"] - 1, length)}

    def _caption_losses(self, visual_tokens: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
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
        index = _placed(self, batch)["word_places"]
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


class MaskedLanguageModel(nn.Module):
    """Predict words that are hidden in the caption, from all the others and the image.

    VirTex (section 4, ablation of tasks) and the released code: BERT's task; the loss is the mean
    cross entropy over the chosen words.
    """

    losses = ("loss_masked_lm",)
    baseline = "unigram_entropy"

    def __init__(self, visual: VisualBackbone, vocab_size: int, **head):
        super().__init__()
        self.visual = visual
        self.textual = TextualHead(visual.feature_size, vocab_size, **head)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        visual_tokens = self.textual.project(self.visual(batch["image"]))  # (N, S, H)
        tokens, lengths = batch["masked_tokens"], batch["caption_lengths"]
        placed = _placed(self, batch)
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

    def num_predictions(self, batch: Batch) -> int:
        """Words that are predicted."""
        return int((batch["masked_labels"] != PADDING).sum())


def _placed(objective: Captioning | MaskedLanguageModel, batch: Batch) -> Batch:
    """The batch with `objective.places` of it."""
    if "word_places" in batch:
        return batch
    device = batch["caption_tokens"].device
    return {key: index.to(device) for key, index in objective.places(batch).items()}


class LinearHead(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, feature_size: int, num_outputs: int):
        super().__init__()
        self.output = nn.Linear(feature_size, num_outputs)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, num_outputs)."""
        return self.output(features.mean(dim=(2, 3)))


class Classification(nn.Module):
    """Tell from the image which words a caption has, or which classes the image shows.

    VirTex (section 4, ablation of tasks) and the released code, after Joulin et al. (arXiv
    1511.02251): log-softmax, averaged over an image's labels, then over the images that have any.

    Args:
        visual: (N, 3, H, W) -> (N, C, h, w), with an attribute `feature_size` = C.
        num_outputs: pieces of the tokenizer, or classes.
        of_tokens: labels are the unique words of the caption, without special pieces; else those in
            `batch["labels"]`.
    """

    losses = ("loss_classification",)
    baseline = "label_entropy"

    def __init__(self, visual: VisualBackbone, num_outputs: int, of_tokens: bool):
        super().__init__()
        self.visual = visual
        self.textual = LinearHead(visual.feature_size, num_outputs)
        self.of_tokens = of_tokens

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self.textual(self.visual(batch["image"]))  # (N, V)
        return {"loss_classification": label_loss(logits, self._labels(batch))}

    def num_predictions(self, batch: Batch) -> int:
        """Images with a label."""
        return int(self._labels(batch).any(dim=1).sum())

    def places(self, batch: Batch) -> Batch:
        """None: it packs nothing."""
        return {}

    def _labels(self, batch: Batch) -> torch.Tensor:
        num_outputs = self.textual.output.out_features
        if self.of_tokens:
            return token_labels(batch["caption_tokens"], num_outputs)
        labels = batch["labels"]
        # one column more takes the -1 of rows that have fewer labels than others
        chosen = torch.zeros(len(labels), num_outputs + 1, dtype=torch.bool, device=labels.device)
        return chosen.scatter_(1, labels % (num_outputs + 1), True)[:, :num_outputs]


def token_labels(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(N, T) -> (N, V) bool: the pieces that a caption has, without the special ones."""
    labels = torch.zeros(len(tokens), vocab_size, dtype=torch.bool, device=tokens.device)
    labels.scatter_(1, tokens, True)
    labels[:, : len(SPECIAL_PIECES)] = False
    return labels


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, V) float, (N, V) bool -> minus log-softmax, mean over labels, then over labelled rows."""
    log_probs = F.log_softmax(logits.float(), dim=1)
    counts = labels.sum(dim=1)
    per_row = -(log_probs * labels).sum(dim=1) / counts.clamp(min=1)
    return per_row.sum() / (counts > 0).sum().clamp(min=1)


def _visual(cfg: CfgNode) -> VisualBackbone:
    visual = cfg.MODEL.VISUAL
    return VisualBackbone(
        visual.NAME,
        visual.ZERO_INIT_RESIDUAL,
        visual.CHANNELS_LAST,
        visual.RECOMPUTE,
        visual.COMPILE,
    )


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


def _captioning(cfg: CfgNode, vocab_size: int, *directions: str) -> Captioning:
    mixes = cfg.MODEL.CAPTIONING
    return Captioning(
        _visual(cfg),
        vocab_size,
        directions,
        mixes.LABEL_SMOOTHING,
        mixes.CLASSIFICATION_WEIGHT,
        **_head_options(cfg),
    )


@OBJECTIVES.register()
def bicaptioning(cfg: CfgNode, num_outputs: int) -> Captioning:
    """Forward and backward captioning: VirTex's objective."""
    return _captioning(cfg, num_outputs, "forward", "backward")


@OBJECTIVES.register()
def captioning(cfg: CfgNode, num_outputs: int) -> Captioning:
    """Forward captioning alone."""
    return _captioning(cfg, num_outputs, "forward")


@OBJECTIVES.register()
def backward_captioning(cfg: CfgNode, num_outputs: int) -> Captioning:
    """Backward captioning alone."""
    return _captioning(cfg, num_outputs, "backward")


@OBJECTIVES.register()
def masked_lm(cfg: CfgNode, num_outputs: int) -> MaskedLanguageModel:
    """Words hidden in the caption."""
    return MaskedLanguageModel(_visual(cfg), num_outputs, **_head_options(cfg))


@OBJECTIVES.register()
def token_classification(cfg: CfgNode, num_outputs: int) -> Classification:
    """The caption's words, as a set."""
    return Classification(_visual(cfg), num_outputs, of_tokens=True)


@OBJECTIVES.register()
def multilabel_classification(cfg: CfgNode, num_outputs: int) -> Classification:
    """The classes of the objects in the image (DATA.TRAIN_LABELS)."""
    return Classification(_visual(cfg), num_outputs, of_tokens=False)


def check_objective(cfg: CfgNode) -> None:
    """Raise InputError if MODEL.OBJECTIVE is none of `OBJECTIVES`, or a share in MODEL.CAPTIONING
    is none.
    """
    name = cfg.MODEL.OBJECTIVE
    if name not in OBJECTIVES:
        names = sorted(key for key, _ in OBJECTIVES)
        raise InputError(
            f"MODEL.OBJECTIVE: {name!r} is not one of {', '.join(names)}." + nearest(name, names)
        )
    mixes = cfg.MODEL.CAPTIONING
    for key in ("LABEL_SMOOTHING", "PARALLEL_SHARE"):
        if not 0 <= mixes[key] <= 1:
            raise InputError(f"MODEL.CAPTIONING.{key} {mixes[key]}: expected a share from 0 to 1.")
    if any(mixes.values()) and not name.endswith("captioning"):
        given = ", ".join(f"{key} {value}" for key, value in mixes.items() if value)
        raise InputError(
            f"MODEL.CAPTIONING ({given}) is for captioning; MODEL.OBJECTIVE is {name}. Set it to 0."
        )


def build_objective(cfg: CfgNode, num_outputs: int) -> nn.Module:
    """The objective `cfg.MODEL.OBJECTIVE` names, on the CPU.

    Args:
        cfg: the run's config.
        num_outputs: pieces of the tokenizer; classes, for an objective on labels.
    """
    check_objective(cfg)
    return OBJECTIVES.get(cfg.MODEL.OBJECTIVE)(cfg, num_outputs)
