"""Tokens a second of beam search with the key/value cache, beside recomputing every prefix.

Float32, random weights of a textual head (by default the base recipe's: H 1024, L 1, A 16, 10 000
pieces), 7 x 7 visual tokens, beam 5, all captions 30 words long (the output layer's bias keeps
[EOS] away). The baseline is nn.TransformerDecoder over the prefix with the output layer on the
last position. Both must find the same captions; then they take turns. The backbone is left out:
it costs both the same.
"""

import argparse

import torch

from benchmarks.measuring import Clock, machine
from benchmarks.rounds import count, ratios, spread, take_turns
from pretrain.methods.captioning.decoding import beam_search
from pretrain.methods.captioning.textual_head import TextualHead
from tests.pretrain import recompute

WORDS, BEAMS, FEATURES = 30, 5, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=count, nargs="+", default=[8, 16], help="at a time; default 8 and 16"
    )
    parser.add_argument("--rounds", type=count, default=3, help="turns of each (default 3)")
    parser.add_argument("--hidden", type=count, default=1024)
    parser.add_argument("--layers", type=count, default=1)
    parser.add_argument("--heads", type=count, default=16)
    parser.add_argument("--vocab", type=count, default=10_000)
    parser.add_argument("--threads", type=int, default=1, help="default 1")


def build_head(hidden: int, layers: int, heads: int, vocab: int) -> TextualHead:
    torch.manual_seed(0)
    head = TextualHead(FEATURES, vocab, hidden, layers, heads, 4 * hidden, max_length=WORDS).eval()
    with torch.no_grad():
        head.output.bias[recompute.EOS] = -1e4
    return head


def measure(args: argparse.Namespace) -> dict:
    """All figures, by number of images.

    Raises:
        AssertionError: the two searches find different captions.
    """
    torch.set_num_threads(args.threads)
    head = build_head(args.hidden, args.layers, args.heads, args.vocab)
    device = torch.device("cpu")
    clock = Clock(device)
    found: dict = {"settings": vars(args), "machine": machine(device), "images": {}}
    for images in args.images:
        features = torch.randn(images, FEATURES, 7, 7, generator=torch.Generator().manual_seed(1))

        def cached(features: torch.Tensor = features) -> list[list[int]]:
            return [caption.tokens for caption in beam_search(head, features, BEAMS, WORDS)]

        def recomputed(features: torch.Tensor = features) -> list[list[int]]:
            return recompute.beam_search(head, features, BEAMS, WORDS)[0].tolist()

        captions = cached()
        assert captions == recomputed(), "the two searches differ"
        assert all(len(caption) == WORDS for caption in captions)
        ways = {"cached": clock.timed(cached), "recomputed": clock.timed(recomputed)}
        turns = take_turns(ways, args.rounds, warm_up=0)  # the check was
        seconds = {name: [turn["all"] for turn in turns[name]] for name in turns}
        found["images"][images] = {
            "tokens_per_s": {
                name: spread([images * WORDS / value for value in values])
                for name, values in seconds.items()
            },
            "ratio": ratios(seconds["recomputed"], seconds["cached"]),
        }
    return found


def report(found: dict) -> str:
    """The figures as text."""
    lines = [f"{found['machine']['device']}, {found['machine']['threads']} threads"]
    for images, of in found["images"].items():
        for name, rate in of["tokens_per_s"].items():
            lines.append(
                f"{images:3} images  {name:10}  {rate['median']:7.1f} tokens/s "
                f"({rate['min']:.1f} to {rate['max']:.1f})"
            )
        ratio = of["ratio"]
        lines.append(
            f"{images:3} images  the cache is {ratio['median']:.1f} times as fast "
            f"({ratio['min']:.1f} to {ratio['max']:.1f})"
        )
    return "\n".join(lines)
