"""Captions out of a captioning model: beam search and nucleus sampling with a key/value cache.

N images, B beams, T tokens of a caption, V words of the vocabulary, S = h * w visual tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pretrain.methods.captioning.textual_head import TextualHead
from pretrain.methods.captioning.tokenizer import Tokenizer
from virtex_d2.engine.errors import InputError

# Head and features (N, C, h, w) -> N captions.
Decode = Callable[[TextualHead, torch.Tensor], "list[Decoded]"]

# Summed log-probabilities (N, B) of the beams, and (N, B, V) those of their next words -> sums,
# words and the beams that these continue, (N, B') each, best first.
_Choose = Callable[
    [torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
]

NEVER_PRODUCED = [Tokenizer.pad_id, Tokenizer.sos_id, Tokenizer.mask_id]


@dataclass(frozen=True, eq=False)
class Decoded:
    """One image's caption.

    Attributes:
        tokens: the pieces without [SOS], with [EOS] where the caption came to its end.
        logprob: the model's log-probability of `tokens`, in nats: a sum, not divided by the length.
        attention: (T, h, w) float32, for each token where the last decoder layer looked when it
            was predicted, mean over heads, each sums to 1; None where it was not asked for.
    """

    tokens: list[int]
    logprob: float
    attention: torch.Tensor | None = None


def beam_search(
    head: TextualHead,
    features: torch.Tensor,
    beam_size: int = 5,
    max_words: int | None = None,
    with_attention: bool = False,
) -> list[Decoded]:
    """Find the most probable captions; `beam_size` 1 is greedy decoding.

    Candidates are ranked by summed log-probability over the whole vocabulary, without length
    normalisation; a finished caption stays a candidate as it is. [SOS], [MASK], <unk> and a piece
    right after itself are never produced.

    Args:
        head: forward captioning head.
        features: (N, C, h, w), of the visual backbone.
        beam_size: captions that are kept at each step.
        max_words: tokens after [SOS], [EOS] included; None is as many as the head has positions.
        with_attention: whether to return it, too.

    Returns:
        N captions.
    """
    if beam_size < 1:
        raise InputError(f"Beam size {beam_size}: expected 1 or more.")

    def choose(scores: torch.Tensor, log_probs: torch.Tensor):
        candidates = (scores.unsqueeze(-1) + log_probs).flatten(1)  # (N, B V)
        scores, chosen = candidates.topk(min(beam_size, candidates.shape[1]))  # best first
        vocabulary = log_probs.shape[-1]
        return scores, chosen % vocabulary, chosen // vocabulary

    return _decode(head, features, choose, _checked_length(head, max_words), with_attention)


def nucleus_sampling(
    head: TextualHead,
    features: torch.Tensor,
    generator: torch.Generator,
    top_p: float = 0.9,
    temperature: float = 1.0,
    max_words: int | None = None,
    with_attention: bool = False,
) -> list[Decoded]:
    """Draw captions, each word from the most probable ones that make up `top_p`.

    Holtzman et al., arXiv 1904.09751, section 3.1. What is never produced is as in `beam_search`,
    and set aside before the nucleus is taken. Each image takes `max_words` numbers from the
    generator, however long its caption: captions depend on the generator's state and the order of
    the images, not on how these are cut into batches.

    Args:
        head, features, max_words, with_attention: as for `beam_search`.
        generator: on the CPU, whatever the model's device.
        top_p: share of the probability, in (0, 1]; 1 is plain sampling.
        temperature: logits are divided by it before; positive.

    Returns:
        N captions; `logprob` is the model's own, without temperature and nucleus.
    """
    if not 0 < top_p <= 1:
        raise InputError(f"Top-p {top_p}: expected a share above 0, and at most 1.")
    if not temperature > 0:
        raise InputError(f"Temperature {temperature}: expected a positive number.")
    max_words = _checked_length(head, max_words)
    draws = torch.rand(len(features), max_words, generator=generator).to(features.device)
    coming = iter(draws.unbind(1))

    def choose(scores: torch.Tensor, log_probs: torch.Tensor):
        log_probs = log_probs.squeeze(1)  # of the one beam
        words = _drawn(log_probs / temperature, top_p, next(coming))
        return scores + log_probs.gather(1, words), words, None

    return _decode(head, features, choose, max_words, with_attention)


def build_decode(
    method: str,
    beam_size: int = 5,
    top_p: float = 0.9,
    temperature: float = 1.0,
    seed: int = 0,
    max_words: int | None = None,
    with_attention: bool = False,
) -> Decode:
    """Set up `beam_search` or `nucleus_sampling` by name: "beam", "greedy", "nucleus"."""
    common = {"max_words": max_words, "with_attention": with_attention}
    if method == "nucleus":
        generator = torch.Generator().manual_seed(seed)
        return partial(
            nucleus_sampling, generator=generator, top_p=top_p, temperature=temperature, **common
        )
    if method not in ("beam", "greedy"):
        raise InputError(f"Decoding {method!r} is not one of beam, greedy, nucleus.")
    return partial(beam_search, beam_size=beam_size if method == "beam" else 1, **common)


@torch.no_grad()
def _decode(
    head: TextualHead,
    features: torch.Tensor,
    choose: _Choose,
    max_words: int,
    with_attention: bool,
) -> list[Decoded]:
    """Decode up to `max_words` words, and return each image's first beam; without dropout."""
    training = head.training
    head.eval()
    try:
        caches = head.start(head.project(features))
        words = torch.full((len(features), 1), Tokenizer.sos_id, device=features.device)
        scores, parents = torch.zeros(words.shape, device=words.device), None
        steps = []  # words (N, B), the beams before that they continue, attention (N, B before, S)
        for place in range(max_words):
            log_probs = _allowed(head.step(words, place, caches, parents), words)  # (N, B, V)
            scores, words, parents = choose(scores, log_probs)
            steps.append((words, parents, caches[-1].attention if with_attention else None))
            # sums only fall: nothing overtakes a finished caption that is ahead
            if (words[:, 0] == Tokenizer.eos_id).all():
                break
    finally:
        head.train(training)
    return _collect(steps, scores[:, 0], features.shape[2:])


def _drawn(logits: torch.Tensor, top_p: float, draw: torch.Tensor) -> torch.Tensor:
    """(N, V) logits and (N,) numbers in [0, 1) -> (N, 1) words."""
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    probs = torch.where(before < top_p, probs, 0.0)
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, draw.unsqueeze(1) * cumulative[:, -1:], right=True)
    # rounding can put the last number behind the last word that has a probability
    return order.gather(1, place.minimum((probs > 0).sum(-1, keepdim=True) - 1))


def _allowed(log_probs: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(N, B, V) and the words before (N, B): -inf for what may not follow, in place."""
    log_probs[..., NEVER_PRODUCED] = -torch.inf
    log_probs.scatter_(-1, words.unsqueeze(-1), -torch.inf)
    finished = words == Tokenizer.eos_id
    log_probs.masked_fill_(finished.unsqueeze(-1), -torch.inf)
    log_probs[..., Tokenizer.eos_id].masked_fill_(finished, 0.0)  # goes on at no cost
    return log_probs


def _checked_length(head: TextualHead, max_words: int | None) -> int:
    positions = head.embedding.positions.num_embeddings
    if max_words is None:
        return positions
    # the last word is produced and not read, so that [SOS] takes no word's position
    if not 1 <= max_words <= positions:
        raise InputError(
            f"{max_words} words a caption: the model has {positions} positions; use 1 to "
            f"{positions}."
        )
    return max_words


def _collect(steps: list[tuple], scores: torch.Tensor, size: torch.Size) -> list[Decoded]:
    """Follow the best beams from the last step back to the first."""
    images = torch.arange(len(scores), device=scores.device)
    beams = torch.zeros_like(images).unsqueeze(1)  # (N, 1)
    tokens, maps = [], []
    for words, parents, attention in reversed(steps):
        tokens.append(words.gather(1, beams))
        beams = beams if parents is None else parents.gather(1, beams)
        if attention is not None:
            maps.append(attention[images, beams[:, 0]])  # (N, S)
    looks = torch.stack(maps[::-1], dim=1).float().cpu() if maps else [None] * len(images)
    captions = []
    for row, score, look in zip(torch.cat(tokens[::-1], 1).tolist(), scores.tolist(), looks):
        if Tokenizer.eos_id in row:
            row = row[: row.index(Tokenizer.eos_id) + 1]
        look = None if look is None else look[: len(row)].unflatten(-1, tuple(size))
        captions.append(Decoded(row, score, look))
    return captions
