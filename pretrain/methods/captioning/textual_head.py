"""The textual head: a Transformer decoder that reads visual tokens and predicts the next word.

VirTex (arXiv 2006.06666, section 3.1): learned word and position embeddings, post-norm decoder
layers with GELU, output layer tied to the word embedding. N samples, T tokens, P tokens of all
samples without padding, V words, H width, S visual tokens.
"""

import torch
from torch import nn

from pretrain.methods.captioning.packed_decoder import Words, decode

PADDING = 0  # also <unk>: the tokenizer's first piece


class WordAndPositionEmbedding(nn.Module):
    """Word plus position embedding -> LayerNorm -> dropout, zero at padding."""

    def __init__(self, vocab_size: int, hidden_size: int, max_length: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocab_size, hidden_size, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, hidden_size)
        # 1e-8, not torch's 1e-5: what VirTex's released weights were trained with
        self.layer_norm = nn.LayerNorm(hidden_size, eps=1e-8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens (..., P) int64 at positions (P,) of their captions -> (..., P, H)."""
        x = self.words(tokens) + self.positions(positions)
        x = self.dropout(self.layer_norm(x))
        return x * (tokens != PADDING).unsqueeze(-1)


class TextualHead(nn.Module):
    """Projection of visual features, embedding, decoder, tied output.

    Args:
        feature_size: channels of the visual features.
        vocab_size, hidden_size, num_layers, attention_heads, feedforward_size, dropout: sizes.
        max_length: tokens of the longest caption, specials included.
        norm: "post" or "pre", where each layer normalises.
        share_with: another head whose projection, embedding and output layer this one uses, as
            the two directions of bicaptioning do.
    """

    def __init__(
        self,
        feature_size: int,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        attention_heads: int,
        feedforward_size: int,
        dropout: float = 0.1,
        max_length: int = 30,
        norm: str = "post",
        share_with: "TextualHead | None" = None,
    ):
        super().__init__()
        if share_with is None:
            self.visual_projection = nn.Linear(feature_size, hidden_size)
            self.embedding = WordAndPositionEmbedding(vocab_size, hidden_size, max_length, dropout)
        else:
            self.visual_projection = share_with.visual_projection
            self.embedding = share_with.embedding
        layer = nn.TransformerDecoderLayer(
            hidden_size,
            attention_heads,
            feedforward_size,
            dropout,
            activation="gelu",
            batch_first=True,
            norm_first=norm == "pre",
        )
        final_norm = nn.LayerNorm(hidden_size) if norm == "pre" else None
        self.transformer = nn.TransformerDecoder(layer, num_layers, norm=final_norm)
        if share_with is None:
            self.output = nn.Linear(hidden_size, vocab_size)
        else:
            self.output = share_with.output
        self.apply(_initialise)
        self.output.weight = self.embedding.words.weight

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Feature map (N, C, h, w) -> visual tokens (N, S = h * w, H)."""
        return self.visual_projection(features.flatten(2).transpose(1, 2))

    def hidden_states(
        self,
        embedded: torch.Tensor,
        visual_tokens: torch.Tensor,
        words: Words,
        at_once: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embedded tokens (P, H) and visual tokens (N, S, H) -> (P, H).

        A token sees those up to itself; in the rows `at_once` (N,) bool, all of its row.
        """
        return decode(self.transformer, embedded, visual_tokens, words, at_once)


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases (VirTex's released code, after BERT)."""
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
