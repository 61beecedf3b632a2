"""What a backbone learns from captions: objectives behind one interface and one registry.

`forward(batch) -> {"loss_...": scalar tensor}` with

    batch["image"]            (N, 3, H, W) float, normalised
    batch["caption_tokens"]   (N, T) int64: [SOS] words [EOS] padding
    batch["caption_lengths"]  (N,) int64: tokens of each caption without padding
"""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from virtex_d2.runtime.errors import InputError, nearest

from .backbone import VisualBackbone
from .textual_head import PADDING, TextualHead

OBJECTIVES = Registry("OBJECTIVES")
OBJECTIVES.__doc__ = (
    "Pretraining objectives: `build(cfg, vocab_size) -> nn.Module`, by config name."
)


def reverse_captions(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(N, T) -> (N, T): each row's first `lengths` tokens reversed, padding behind them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mirrored = lengths.unsqueeze(1) - 1 - positions
    return tokens.gather(1, torch.where(mirrored >= 0, mirrored, positions))


class Captioning(nn.Module):
    """Predict every next token of the caption, forward and optionally backward.

    VirTex, section 3.1: two decoders share projection, embeddings and output layer; the loss of a
    direction is the mean cross entropy over predicted tokens, padding ignored; the two are summed.

    Args:
        visual: (N, 3, H, W) -> (N, C, h, w), with an attribute `feature_size` = C.
        vocab_size: pieces of the tokenizer.
        bidirectional: whether to caption backward, too.
        head: further arguments of `TextualHead`.
    """

    def __init__(self, visual: VisualBackbone, vocab_size: int, bidirectional: bool, **head):
        super().__init__()
        self.visual = visual
        self.textual = TextualHead(visual.feature_size, vocab_size, **head)
        if bidirectional:
            self.backward_textual = TextualHead(
                visual.feature_size, vocab_size, **head, share_with=self.textual
            )
        self.bidirectional = bidirectional

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        visual_tokens = self.textual.project(self.visual(batch["image"]))  # (N, S, H)
        tokens, lengths = batch["caption_tokens"], batch["caption_lengths"]
        losses = {"loss_captioning_forward": _loss(self.textual, visual_tokens, tokens)}
        if self.bidirectional:
            losses["loss_captioning_backward"] = _loss(
                self.backward_textual, visual_tokens, reverse_captions(tokens, lengths)
            )
        return losses


def _loss(head: TextualHead, visual_tokens: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats, of tokens 1.. given those before them."""
    targets = tokens[:, 1:]
    predicted = targets != PADDING  # (N, T - 1)
    hidden = head.hidden_states(visual_tokens, tokens[:, :-1])
    # the output layer is the widest there is: spend it on real targets only
    logits = head.output(hidden[predicted])  # (predicted tokens, V)
    return F.cross_entropy(logits.float(), targets[predicted])


def _captioning(cfg: CfgNode, vocab_size: int, bidirectional: bool) -> Captioning:
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
    visual = VisualBackbone(
        cfg.MODEL.VISUAL.NAME, cfg.MODEL.VISUAL.ZERO_INIT_RESIDUAL, cfg.MODEL.VISUAL.CHANNELS_LAST
    )
    return Captioning(
        visual,
        vocab_size,
        bidirectional,
        hidden_size=width,
        num_layers=textual.NUM_LAYERS,
        attention_heads=heads,
        feedforward_size=textual.FEEDFORWARD_SIZE or 4 * width,
        dropout=textual.DROPOUT,
        max_length=textual.MAX_LENGTH,
        norm=textual.NORM,
    )


@OBJECTIVES.register()
def bicaptioning(cfg: CfgNode, vocab_size: int) -> Captioning:
    """Forward and backward captioning: VirTex's objective."""
    return _captioning(cfg, vocab_size, bidirectional=True)


@OBJECTIVES.register()
def captioning(cfg: CfgNode, vocab_size: int) -> Captioning:
    """Forward captioning alone."""
    return _captioning(cfg, vocab_size, bidirectional=False)


def build_objective(cfg: CfgNode, vocab_size: int) -> nn.Module:
    """The objective `cfg.MODEL.OBJECTIVE` names, on the CPU.

    Raises:
        InputError: no objective has that name, or its sizes do not fit together.
    """
    name = cfg.MODEL.OBJECTIVE
    if name not in OBJECTIVES:
        names = sorted(key for key, _ in OBJECTIVES)
        raise InputError(
            f"MODEL.OBJECTIVE: {name!r} is not one of {', '.join(names)}." + nearest(name, names)
        )
    return OBJECTIVES.get(name)(cfg, vocab_size)
