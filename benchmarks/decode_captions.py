#!/usr/bin/env python
"""Tokens a second of beam search with the key/value cache, beside recomputing every prefix.

python benchmarks/decode_captions.py

One thread, float32, random weights of the base recipe's textual head (H 1024, L 1, A 16, 10 000
pieces), 7 x 7 visual tokens, beam 5, all captions 30 words long (the output layer's bias keeps
[EOS] away). The baseline is nn.TransformerDecoder over the prefix with the output layer on the
last position. Both must find the same captions; then they take turns. The backbone is left out:
it costs both the same.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pretrain.decoding import beam_search  # noqa: E402
from pretrain.textual_head import TextualHead  # noqa: E402
from tests.pretrain import recompute  # noqa: E402

WORDS, BEAMS, FEATURES = 30, 5, 2048


def build_head(hidden: int, layers: int, heads: int, vocab: int) -> TextualHead:
    torch.manual_seed(0)
    head = TextualHead(FEATURES, vocab, hidden, layers, heads, 4 * hidden, max_length=WORDS).eval()
    with torch.no_grad():
        head.output.bias[recompute.EOS] = -1e4
    return head


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, nargs="+", default=[8, 16], help="at a time; default 8 and 16"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=10_000)
    args = parser.parse_args()

    torch.set_num_threads(1)
    head = build_head(args.hidden, args.layers, args.heads, args.vocab)
    for images in args.images:
        features = torch.randn(images, FEATURES, 7, 7, generator=torch.Generator().manual_seed(1))

        def cached(features: torch.Tensor = features) -> list[list[int]]:
            return [caption.tokens for caption in beam_search(head, features, BEAMS, WORDS)]

        def recomputed(features: torch.Tensor = features) -> list[list[int]]:
            return recompute.beam_search(head, features, BEAMS, WORDS)[0].tolist()

        captions = cached()
        assert captions == recomputed(), "the two searches differ"
        assert all(len(caption) == WORDS for caption in captions)
        times: dict[str, list[float]] = {"cached": [], "recomputed": []}
        for _ in range(args.rounds):
            times["cached"].append(seconds(cached))
            times["recomputed"].append(seconds(recomputed))
        for name, values in times.items():
            rates = [images * WORDS / value for value in values]
            print(
                f"{images:3} images  {name:10}  {statistics.median(rates):7.1f} tokens/s "
                f"(from {min(rates):.1f} to {max(rates):.1f}; {statistics.median(values):.2f} s)"
            )
        ratios = [r / c for c, r in zip(times["cached"], times["recomputed"])]
        print(
            f"{images:3} images  the cache is {statistics.median(ratios):.1f} times as fast "
            f"(from {min(ratios):.1f} to {max(ratios):.1f} over {args.rounds} rounds)",
            flush=True,
        )


if __name__ == "__main__":
    main()
