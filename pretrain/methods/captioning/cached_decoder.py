"""A textual head that reads captions one word at a time, and keeps what it computed before.

N images, B beams, T words so far, V words of the vocabulary, H width, A attention heads, D = H / A,
S visual tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.methods.captioning.textual_head import PADDING, TextualHead


class CachedDecoder:
    """A `TextualHead` that reads captions one word at a time.

    A word's self-attention keys and values do not change with the words behind it, and those of
    the image never do: they are computed once and kept, so that a step costs one position instead
    of the whole prefix. Evaluates what `TextualHead.hidden_states` does without dropout.

    Args:
        head: forward captioning head.
        visual_tokens: (N, S, H), of `head.project`.
    """

    def __init__(self, head: TextualHead, visual_tokens: torch.Tensor):
        self._head = head
        self._layers = [_CachedLayer(layer, visual_tokens) for layer in head.transformer.layers]
        self._length = 0

    def step(self, words: torch.Tensor, parents: torch.Tensor | None = None) -> torch.Tensor:
        """Append a word to every beam.

        Args:
            words: (N, B) int64.
            parents: (N, B) int64, the beam of the step before that each of these continues; None
                where each continues itself.

        Returns:
            (N, B, V) log-probabilities of the next word, float32 at least.
        """
        embedding = self._head.embedding
        x = embedding.words(words) + embedding.positions.weight[self._length]  # (N, B, H)
        x = embedding.layer_norm(x) * (words != PADDING).unsqueeze(-1)
        for layer in self._layers:
            x = layer(x, parents)
        if self._head.transformer.norm is not None:
            x = self._head.transformer.norm(x)
        self._length += 1
        logits = self._head.output(x)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits, dim=-1, dtype=dtype)

    @property
    def attention(self) -> torch.Tensor:
        """(N, B, S): where the last layer looked in the last step, mean over heads."""
        return self._layers[-1].image_weights.mean(1)


class _CachedLayer:
    """One `nn.TransformerDecoderLayer`, a position at a time."""

    def __init__(self, layer: nn.TransformerDecoderLayer, visual_tokens: torch.Tensor):
        self._layer = layer
        self._heads = layer.self_attn.num_heads
        image, width = layer.multihead_attn, visual_tokens.shape[-1]
        keys_values = F.linear(
            visual_tokens, image.in_proj_weight[width:], image.in_proj_bias[width:]
        )
        keys, values = (self._split(part) for part in keys_values.chunk(2, dim=-1))
        self._image_keys = keys.transpose(-1, -2).contiguous()  # (N, A, D, S)
        self._image_values = values.contiguous()  # (N, A, S, D)
        self._keys = self._values = visual_tokens.new_empty(0)  # (N, B, A, T, D) from the 1st word
        self.image_weights = visual_tokens.new_empty(0)  # (N, A, B, S) of the last step

    def __call__(self, x: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """(N, B, H) -> (N, B, H)."""
        layer = self._layer
        if layer.norm_first:
            x = x + self._attend_to_words(layer.norm1(x), parents)
            x = x + self._attend_to_image(layer.norm2(x))
            return x + self._feedforward(layer.norm3(x))
        x = layer.norm1(x + self._attend_to_words(x, parents))
        x = layer.norm2(x + self._attend_to_image(x))
        return layer.norm3(x + self._feedforward(x))

    def _attend_to_words(self, x: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        attention = self._layer.self_attn
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self._heads, 1, -1)).unbind(2)
        if self._keys.numel():
            key = torch.cat([_of_parents(self._keys, parents), key], dim=-2)
            value = torch.cat([_of_parents(self._values, parents), value], dim=-2)
        self._keys, self._values = key, value
        # every position is one before or the newest itself: nothing to mask
        weights = _weights(query, key.transpose(-1, -2))  # (N, B, A, 1, T)
        return attention.out_proj((weights @ value).flatten(2))

    def _attend_to_image(self, x: torch.Tensor) -> torch.Tensor:
        attention, width = self._layer.multihead_attn, x.shape[-1]
        query = F.linear(x, attention.in_proj_weight[:width], attention.in_proj_bias[:width])
        # the beams of an image are queries to the same keys: nothing is copied for each beam
        self.image_weights = _weights(self._split(query), self._image_keys)  # (N, A, B, S)
        mixed = self.image_weights @ self._image_values  # (N, A, B, D)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _feedforward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        return layer.linear2(layer.activation(layer.linear1(x)))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, B or S, H) -> (N, A, B or S, D)."""
        return x.unflatten(-1, (self._heads, -1)).transpose(1, 2)


def _weights(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(..., Q, D) and (..., D, K) -> attention (..., Q, K)."""
    return (query @ keys / math.sqrt(query.shape[-1])).softmax(-1)


def _of_parents(cache: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
    """(N, B', A, T, D) -> (N, B, A, T, D): for each beam what its parent holds."""
    if parents is None:
        return cache
    first = torch.arange(len(cache), device=cache.device).unsqueeze(1) * cache.shape[1]
    rows = cache.flatten(0, 1).index_select(0, (first + parents).flatten())
    return rows.unflatten(0, parents.shape)
