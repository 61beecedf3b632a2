#!/usr/bin/env python
"""Train a caption tokenizer (SentencePiece BPE), and say how well it fits the captions.

python tools/build_vocabulary.py --captions captions_train.json --images images/train \\
    --vocab-size 10000 --output tokenizer.model

The file goes into DATA.TOKENIZER. The same captions and size give the same bytes.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", required=True, help="as DATA.TRAIN_CAPTIONS")
    parser.add_argument("--images", default="", help="as DATA.TRAIN_IMAGES")
    parser.add_argument("--data-format", default="coco", help="as DATA.FORMAT; default coco")
    parser.add_argument("--split", default="", help="as DATA.TRAIN_SPLIT")
    parser.add_argument("--output", required=True, help="the SentencePiece model to write")
    parser.add_argument("--vocab-size", type=int, default=10_000, help="pieces; default 10000")
    parser.add_argument("--strip-accents", action="store_true", help="as DATA.STRIP_ACCENTS")
    parser.add_argument("--caption-key", default="", help="as DATA.CAPTION_KEY")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the summary")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # after parsing: --help need not wait for torch
    from pretrain.data import Source, load_records
    from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
    from pretrain.methods.captioning.vocabulary import merge_warning, summarise
    from virtex_d2.engine.errors import InputError, exit_on_input_error

    with exit_on_input_error():
        if os.path.exists(args.output) and not args.overwrite:
            raise InputError(
                f"{args.output}: exists already, and a model may need it. Choose another name, or "
                "--overwrite."
            )
        source = Source(
            args.data_format,
            args.captions,
            args.images,
            args.split,
            index_dir=os.path.dirname(args.output) or ".",
            caption_key=args.caption_key,
        )
        captions = load_records(source, "--data-format").captions
        train_tokenizer(captions, args.vocab_size, args.output, args.strip_accents)
        summary = summarise(Tokenizer(args.output), captions)
        if args.format == "json":
            print(json.dumps(dataclasses.asdict(summary)))
        else:
            print("\n".join(summary.lines()))
        merged = merge_warning(captions) if args.strip_accents else ""
        for warning in filter(None, (summary.warning(), merged)):
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
