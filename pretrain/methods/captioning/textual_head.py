"""The textual head: a Transformer decoder that reads visual tokens and predicts the next word.

VirTex (arXiv 2006.06666, section 3.1): learned word and position embeddings, post-norm decoder
layers with GELU, output layer tied to the word embedding.

Training packs: real captions fill about half of a padded batch, so that all that works on single
words (projections, feed-forward, norms) runs on the P words alone; only attention sees a padded
grid. Decoding caches: keys and values do not change with the words behind them, so that a step
costs one position and not the whole prefix.

N images, T tokens of a caption, P tokens of all captions without padding, B beams, V words, H
width, A attention heads, D = H / A, S visual tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PADDING = 0  # also <unk>: the tokenizer's first piece

# P is a multiple of this, made up with places of the grid that hold padding: what a matrix product
# keeps for each new shape (oneDNN's compiled primitives on a CPU: 24 MB for five linear layers)
# would otherwise grow with every new number of words.
ROWS = 64


def places(chosen: np.ndarray) -> torch.Tensor:
    """(M,) bool -> (P,) int64 on the host: where it is true, then some where it is not.

    P is the next multiple of `ROWS`, at most M.
    """
    there = np.flatnonzero(chosen)
    spare = np.flatnonzero(~chosen)[: -len(there) % ROWS]
    return torch.from_numpy(np.concatenate([there, spare]))


def word_places(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """`Words.index` for (N,) int64 and T. Lengths on the host keep no device waiting."""
    return places((np.arange(length) < lengths.cpu().numpy()[:, None]).ravel())


@dataclass(frozen=True)
class Words:
    """Where in a padded (N, T) grid words are: the first ones of each row.

    Attributes:
        shape: (N, T).
        lengths: (N,) int64, words of each row.
        index: (P,) int64 of `word_places`, on the device of what is packed.
    """

    shape: tuple[int, int]
    lengths: torch.Tensor
    index: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """(P,) int64: how many words of its row stand before each."""
        return self.index % self.shape[1]

    def pack(self, grid: torch.Tensor) -> torch.Tensor:
        """(N, T, ...) -> (P, ...)."""
        return grid.flatten(0, 1).index_select(0, self.index)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(P, C) -> (N, T, C), zero where none of the P is."""
        rows, length = self.shape
        grid = packed.new_zeros(rows * length, packed.shape[1])
        return grid.index_copy(0, self.index, packed).unflatten(0, self.shape)

    def visible(self, at_once: torch.Tensor) -> torch.Tensor:
        """Mask of self-attention, (N, 1, T, T) bool: in the rows `at_once` (N,) bool each word sees
        all of its row, in others itself and those before it."""
        steps = torch.arange(self.shape[1], device=at_once.device)
        causal = steps.unsqueeze(1) >= steps  # (T, T)
        there = steps < self.lengths.view(-1, 1, 1)  # (N, 1, T)
        return torch.where(at_once.view(-1, 1, 1), there, causal).unsqueeze(1)


class Cache:
    """Keys and values of one decoder layer.

    Args:
        image: those of the visual tokens, (N, A, S, D) each.
    """

    def __init__(self, image: Sequence[torch.Tensor]):
        self.image = [part.contiguous() for part in image]
        self.words: Sequence[torch.Tensor] | None = None  # (N, B, A, T, D) each
        self.query: torch.Tensor | None = None  # (N, A, B, D), the last step's to the image

    def append(self, new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Add the beams' next words, (N, B, A, 1, D) each; returns all of them."""
        if self.words is not None:
            new = [torch.cat(pair, dim=-2) for pair in zip(self.words, new)]
        self.words = new
        return new

    def reorder(self, parents: torch.Tensor) -> None:
        """Give each beam, (N, B) int64, the words of the beam that it continues."""
        images, beams = self.words[0].shape[:2]
        first = torch.arange(images, device=parents.device).unsqueeze(1) * beams
        rows = (first + parents).flatten()
        self.words = [
            part.flatten(0, 1).index_select(0, rows).unflatten(0, parents.shape)
            for part in self.words
        ]

    @property
    def attention(self) -> torch.Tensor:
        """(N, B, S): where each beam looked in the last step, mean over heads."""
        scores = self.query @ self.image[0].transpose(-1, -2) / math.sqrt(self.query.shape[-1])
        return scores.softmax(-1).mean(1)


class DecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, cross-attention, feed-forward; with torch's parameters and their names."""

    def forward(
        self,
        x: torch.Tensor,
        image: Sequence[torch.Tensor],
        words: Words | None = None,
        visible: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Map the packed words of all captions, (P, H), or the beams' next words, (N, B, H).

        Args:
            x: one of these.
            image: of `image_keys_values`.
            words: where the P words are; None with a cache.
            visible: (N, 1, T, T) bool, what each word sees; None: itself and those before it.
            cache: of the words before.
        """
        if self.norm_first:
            x = x + self.dropout1(self._self_attention(self.norm1(x), words, visible, cache))
            x = x + self.dropout2(self._cross_attention(self.norm2(x), image, words, cache))
            return x + self._feedforward(self.norm3(x))
        x = self.norm1(x + self.dropout1(self._self_attention(x, words, visible, cache)))
        x = self.norm2(x + self.dropout2(self._cross_attention(x, image, words, cache)))
        return self.norm3(x + self._feedforward(x))

    def image_keys_values(self, visual_tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """(N, S, H) -> keys and values of cross-attention, (N, A, S, D) each."""
        attention, width = self.multihead_attn, visual_tokens.shape[-1]
        weight, bias = attention.in_proj_weight[width:], attention.in_proj_bias[width:]
        return _heads(F.linear(visual_tokens, weight, bias), 2, attention.num_heads)

    def _self_attention(
        self,
        x: torch.Tensor,
        words: Words | None,
        visible: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        attention = self.self_attn
        x = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (P, 3 H) or (N, B, 3 H)
        grid = words.unpack(x) if cache is None else x.unsqueeze(2)  # (N, T, 3 H) or (N, B, 1, 3 H)
        query, *pairs = _heads(grid, 3, attention.num_heads)  # (N, A, T, D) or (N, B, A, 1, D)
        if cache is not None:
            pairs = cache.append(pairs)  # each word is the newest itself or before it: no mask
        x = F.scaled_dot_product_attention(
            query,
            *pairs,
            attn_mask=visible,
            dropout_p=attention.dropout if attention.training else 0.0,
            # padding stands behind the words: no word sees it
            is_causal=visible is None and cache is None,
        )
        grid = x.transpose(-3, -2).flatten(-2)  # (N, T, H) or (N, B, 1, H)
        return attention.out_proj(words.pack(grid) if cache is None else grid.squeeze(2))

    def _cross_attention(
        self,
        x: torch.Tensor,
        image: Sequence[torch.Tensor],
        words: Words | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        attention, width = self.multihead_attn, x.shape[-1]
        x = F.linear(x, attention.in_proj_weight[:width], attention.in_proj_bias[:width])
        # the beams of an image are queries to the same keys: nothing is copied for each beam
        grid = words.unpack(x) if cache is None else x  # (N, T or B, H)
        (query,) = _heads(grid, 1, attention.num_heads)  # (N, A, T or B, D)
        if cache is not None:
            cache.query = query
        dropout = attention.dropout if attention.training else 0.0
        x = F.scaled_dot_product_attention(query, *image, dropout_p=dropout)
        grid = x.transpose(-3, -2).flatten(-2)  # (N, T or B, H)
        return attention.out_proj(words.pack(grid) if cache is None else grid)

    def _feedforward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))


def _heads(x: torch.Tensor, parts: int, heads: int) -> Sequence[torch.Tensor]:
    """(..., T, parts * H) -> `parts` tensors (..., A, T, D)."""
    x = x.unflatten(-1, (parts, heads, -1))  # (..., T, parts, A, D)
    return x.movedim(-3, 0).transpose(-3, -2).unbind(0)


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
        """Tokens (..., P) int64 at positions (P,) or () of their captions -> (..., P, H)."""
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
        layer = DecoderLayer(
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
        self.output = (
            nn.Linear(hidden_size, vocab_size) if share_with is None else share_with.output
        )
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
        visible = None if at_once is None else words.visible(at_once)
        x = embedded
        for layer in self.transformer.layers:
            x = layer(x, layer.image_keys_values(visual_tokens), words, visible)
        return self._normed(x)

    def start(self, visual_tokens: torch.Tensor) -> list[Cache]:
        """Make the layers' caches, to decode captions of visual tokens (N, S, H) by `step`."""
        layers = self.transformer.layers
        return [Cache(layer.image_keys_values(visual_tokens)) for layer in layers]

    def step(
        self, tokens: torch.Tensor, place: int, caches: list[Cache], parents: torch.Tensor | None
    ) -> torch.Tensor:
        """Append a word to every beam, and predict the one behind it.

        Args:
            tokens: (N, B) int64, the words.
            place: of the words in their captions, from 0 on.
            caches: of `start`; they get the words.
            parents: (N, B) int64, the beam of the step before that each of these continues; None:
                itself.

        Returns:
            (N, B, V) log-probabilities, float32 at least.
        """
        x = self.embedding(tokens, torch.full((), place, device=tokens.device))  # (N, B, H)
        for layer, cache in zip(self.transformer.layers, caches):
            if parents is not None:
                cache.reorder(parents)
            x = layer(x, cache.image, cache=cache)
        logits = self.output(self._normed(x))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.transformer.norm is None else self.transformer.norm(x)


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases (VirTex's released code, after BERT)."""
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
