"""`nn.TransformerDecoder` on captions of different lengths, without a product spent on padding.

Real captions fill about half of a padded batch. All that works on single words (projections,
feed-forward, norms) runs here on the P words that are there; only self- and cross-attention see
them as a padded grid. N captions of at most T words, H width, A heads, S visual tokens.

P is a multiple of 64, made up with places of the grid that hold padding: what a matrix product
keeps for each new shape (oneDNN's compiled primitives on a CPU: 24 MB for five linear layers) would
otherwise grow with every new number of words.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """(P, C) -> (N, T, C), zero where none of the P is."""
        rows, length = self.shape
        grid = packed.new_zeros(rows * length, packed.shape[1])
        return grid.index_copy(0, self.index, packed).unflatten(0, self.shape)


def decode(
    decoder: nn.TransformerDecoder,
    x: torch.Tensor,
    visual_tokens: torch.Tensor,
    words: Words,
    at_once: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the decoder makes of embedded words, each seeing itself and the words before it.

    Args:
        decoder: of `nn.TransformerDecoderLayer`s, whose weights and dropout are used.
        x: (P, H), packed as `words` says.
        visual_tokens: (N, S, H).
        words: where the P words are.
        at_once: (N,) bool, rows whose words see all words of the row. None: no row.

    Returns:
        (P, H).
    """
    visible = None
    if at_once is not None:
        steps = torch.arange(words.shape[1], device=x.device)
        causal = steps.unsqueeze(1) >= steps  # (T, T)
        there = steps < words.lengths.view(-1, 1, 1)  # (N, 1, T)
        visible = torch.where(at_once.view(-1, 1, 1), there, causal).unsqueeze(1)  # (N, 1, T, T)
    for layer in decoder.layers:
        if layer.norm_first:
            x = x + layer.dropout1(_see_words(layer.self_attn, layer.norm1(x), words, visible))
            x = x + layer.dropout2(
                _see_image(layer.multihead_attn, layer.norm2(x), visual_tokens, words)
            )
            x = x + _feedforward(layer, layer.norm3(x))
        else:
            x = layer.norm1(x + layer.dropout1(_see_words(layer.self_attn, x, words, visible)))
            x = layer.norm2(
                x + layer.dropout2(_see_image(layer.multihead_attn, x, visual_tokens, words))
            )
            x = layer.norm3(x + _feedforward(layer, x))
    return x if decoder.norm is None else decoder.norm(x)


def _see_words(
    attention: nn.MultiheadAttention, x: torch.Tensor, words: Words, visible: torch.Tensor | None
) -> torch.Tensor:
    """Self-attention, (P, H) -> (P, H); `visible` (N, 1, T, T) bool, None: causal."""
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (P, 3 H)
    grid = words.spread(projected).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = grid.permute(2, 0, 3, 1, 4)  # each (N, A, T, H / A)
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=attention.dropout if attention.training else 0.0,
        is_causal=visible is None,  # padding stands behind the words: no word sees it
    )
    return attention.out_proj(words.pack(mixed.transpose(1, 2).flatten(2)))


def _see_image(
    attention: nn.MultiheadAttention, x: torch.Tensor, visual_tokens: torch.Tensor, words: Words
) -> torch.Tensor:
    """Attention of words to visual tokens, (P, H) and (N, S, H) -> (P, H)."""
    width, heads = x.shape[1], attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = words.spread(F.linear(x, weight[:width], bias[:width])).unflatten(-1, (heads, -1))
    pairs = F.linear(visual_tokens, weight[width:], bias[width:])  # (N, S, 2 H)
    key, value = pairs.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # (N, A, S, H / A)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key,
        value,
        dropout_p=attention.dropout if attention.training else 0.0,
    )
    return attention.out_proj(words.pack(mixed.transpose(1, 2).flatten(2)))


def _feedforward(layer: nn.TransformerDecoderLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))))
