"""Bicaptioning as one writes it first: what the project's own step is held up against.

torchvision's ResNet and `nn.TransformerDecoder` as they come, a pass for each direction, logits of
every position. Nothing is slowed down: with the same weights it computes the same losses.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pretrain.methods.captioning.model import Captioning, reverse_captions

PADDING = 0


class PlainBicaptioner(nn.Module):
    """VirTex's bicaptioning (arXiv 2006.06666, section 3.1) with a ResNet-50.

    Args:
        vocab_size, width, layers: sizes; heads of 64 channels, a feed-forward of 4 times the width.
        dropout: of embedding and decoder.
        max_length: tokens of the longest caption.
    """

    def __init__(
        self, vocab_size: int, width: int, layers: int, dropout: float, max_length: int = 30
    ):
        super().__init__()
        cnn = torchvision.models.resnet50(weights=None)
        self.cnn = nn.Sequential(*list(cnn.children())[:-2])
        self.projection = nn.Linear(2048, width)
        self.words = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, width)
        self.norm = nn.LayerNorm(width, eps=1e-8)
        self.dropout = nn.Dropout(dropout)

        def decoder() -> nn.TransformerDecoder:
            layer = nn.TransformerDecoderLayer(
                width, width // 64, 4 * width, dropout, activation="gelu", batch_first=True
            )
            return nn.TransformerDecoder(layer, layers)

        self.forwards, self.backwards = decoder(), decoder()
        self.output = nn.Linear(width, vocab_size)
        self.output.weight = self.words.weight

    def forward(
        self, image: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) float, (N, T) int64, (N,) int64 -> the losses of both directions."""
        features = self.cnn(image)  # (N, 2048, h, w)
        visual = self.projection(features.flatten(2).transpose(1, 2))  # (N, h * w, width)
        mirrored = reverse_captions(tokens, lengths)
        return {
            "loss_captioning_forward": self._loss(self.forwards, visual, tokens),
            "loss_captioning_backward": self._loss(self.backwards, visual, mirrored),
        }

    def _loss(
        self, decoder: nn.TransformerDecoder, visual: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.dropout(self.norm(self.words(inputs) + self.positions(places)))
        x = x * (inputs != PADDING).unsqueeze(-1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(places), device=inputs.device)
        logits = self.output(decoder(x, visual, tgt_mask=mask))  # (N, T - 1, V)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="mean"
        )

    @classmethod
    def of(cls, ours: Captioning, dropout: float) -> "PlainBicaptioner":
        """The plain model with the weights of an objective with a ResNet-50 and post-norm."""
        layers = ours.textual.transformer.num_layers
        vocab_size, width = ours.textual.embedding.words.weight.shape
        plain = cls(vocab_size, width, layers, dropout)
        pairs = [
            (plain.projection, ours.textual.visual_projection),
            (plain.words, ours.textual.embedding.words),
            (plain.positions, ours.textual.embedding.positions),
            (plain.norm, ours.textual.embedding.layer_norm),
            (plain.forwards, ours.textual.transformer),
            (plain.backwards, ours.backward_textual.transformer),
            (plain.output, ours.textual.output),
            *zip(plain.cnn, list(ours.visual.cnn.children())[:-2], strict=True),
        ]
        for mine, theirs in pairs:
            mine.load_state_dict(theirs.state_dict())
        return plain
