"""Decoding without a cache: the whole prefix through torch's decoder layers at every step.

The baseline that `decoding.py` is tested and timed against, on another path on purpose:
`nn.TransformerDecoderLayer` itself, the output layer on the last position only, plain prefixes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.methods.captioning.textual_head import TextualHead

PAD, SOS, EOS, MASK = range(4)


def hidden_states(
    head: TextualHead, visual_tokens: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """(N, S, H) and (N, T) -> (N, T, H), every position seeing itself and those before it."""
    positions = torch.arange(tokens.shape[1])
    embedded = head.embedding(tokens, positions)
    mask = nn.Transformer.generate_square_subsequent_mask(len(positions)).to(embedded.dtype)
    x = embedded
    for layer in head.transformer.layers:  # torch's own forward, not the one that is tested
        x = nn.TransformerDecoderLayer.forward(layer, x, visual_tokens, tgt_mask=mask)
    return x if head.transformer.norm is None else head.transformer.norm(x)


def next_log_probs(
    head: TextualHead, visual_tokens: torch.Tensor, prefixes: torch.Tensor
) -> torch.Tensor:
    """(R, S, H) and (R, T) prefixes -> (R, V), with what may not follow at -inf."""
    hidden = hidden_states(head, visual_tokens, prefixes)[:, -1]
    log_probs = F.log_softmax(head.output(hidden), dim=-1)
    log_probs[:, [PAD, SOS, MASK]] = -torch.inf
    last = prefixes[:, -1:]
    log_probs.scatter_(1, last, -torch.inf)
    finished = last[:, 0] == EOS
    log_probs[finished] = -torch.inf
    log_probs[finished, EOS] = 0.0
    return log_probs


@torch.no_grad()
def beam_search(
    head: TextualHead, features: torch.Tensor, beam_size: int, max_words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T) tokens of the best captions without [SOS], behind [EOS] more of it, and (N,) sums."""
    memory = head.project(features)  # (N, S, H)
    images = len(memory)
    prefixes = torch.full((images, 1, 1), SOS)  # (N, B, T)
    scores = torch.zeros(images, 1, dtype=memory.dtype)
    for _ in range(max_words):
        beams = prefixes.shape[1]
        log_probs = next_log_probs(
            head, memory.repeat_interleave(beams, dim=0), prefixes.flatten(0, 1)
        )
        vocab = log_probs.shape[-1]
        candidates = (scores.flatten().unsqueeze(1) + log_probs).view(images, beams * vocab)
        scores, chosen = candidates.topk(min(beam_size, beams * vocab))
        parents = prefixes.gather(
            1, (chosen // vocab).unsqueeze(-1).expand(-1, -1, prefixes.shape[2])
        )
        prefixes = torch.cat([parents, (chosen % vocab).unsqueeze(-1)], dim=-1)
        if (prefixes[:, 0, -1] == EOS).all():
            break
    return prefixes[:, 0, 1:], scores[:, 0]


def until_end(tokens: list[int]) -> list[int]:
    """Tokens up to the first [EOS], which is kept."""
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
