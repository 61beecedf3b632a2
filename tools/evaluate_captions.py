#!/usr/bin/env python
"""Score captions against references: BLEU, ROUGE-L, CIDEr, METEOR, SPICE.

python tools/caption_images.py output/pretrain images/val --format json > captions.jsonl
python tools/evaluate_captions.py captions.jsonl annotations/captions_val.json

PREDICTIONS are those lines, or COCO results: [{"image_id": 1, "caption": "a cat"}, ...]. Needs
requirements-captions.txt; METEOR, SPICE and COCO's own tokenizer need Java, and SPICE at its first
use the internet. What cannot be computed is named.
"""

import argparse
import dataclasses
import json
import signal


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", help="JSON lines or COCO results: a caption an image")
    parser.add_argument("references", help="COCO captions of the same images")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--java-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for tokenizer, METEOR and SPICE each (default 600)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # after parsing: --help need not wait for torch
    from pretrain.methods.captioning.caption_files import read_predictions, read_references
    from pretrain.methods.captioning.metrics import score_captions
    from virtex_d2.engine.errors import exit_on_input_error

    with exit_on_input_error():
        references, names = read_references(args.references)
        candidates = read_predictions(args.predictions, references, names)
        result = score_captions(candidates, references, args.java_timeout)
        if args.format == "json":
            about = {"images": len(candidates), **dataclasses.asdict(result)}
            print(json.dumps({key: about[key] for key in about if key != "note" or about[key]}))
            return
        print(f"{len(candidates)} images; tokenizer: {result.tokenizer}")
        if result.note:
            print(result.note)
        for name, score in result.scores.items():
            print(f"{name:8} {score:.4f}")
        for name, reason in result.missing.items():
            print(f"{name:8} not computed: {reason}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
