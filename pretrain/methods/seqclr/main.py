"""The mains of the tools for words: train a recogniser, read words, check sets of words.

Each parses its arguments before it imports torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError

OBJECTIVE = "word_recognition"
PROBLEMS_FOUND = 1  # exit code


def train_recognizer(args: argparse.Namespace) -> None:
    """Run tools/train_recognizer.py; arguments of `virtex_d2.engine.cli.argument_parser`."""
    from pretrain.main import main

    args.opts = ["MODEL.OBJECTIVE", OBJECTIVE, *args.opts]
    main(args)


def read_words(description: str, argv: Sequence[str] | None = None) -> int:
    """Run tools/read_words.py; 1 where some images cannot be decoded."""
    parser = program_parser(description)
    parser.add_argument("model", help="recognizer.safetensors, or the folder of its run")
    parser.add_argument("images", help="an image, a folder of images, or a set (docs/seqclr.md)")
    parser.add_argument("--batch-size", type=int, default=64, help="words at a time; default 64")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if there is"
    )
    args = parser.parse_args(argv)

    from pretrain.methods.seqclr.reading import images_to_read, load_reader

    reader = load_reader(args.model, args.device)
    some_failed = False
    for image in reader.read_records(images_to_read(args.images), args.batch_size):
        if image.reading is None:
            some_failed = True
            print(f"{image.name}: cannot be decoded: {image.error}", file=sys.stderr)
        else:
            found = image.reading
            print(f"{image.name}\t{found.text}\t{found.confidence:.4f}", flush=True)
    return int(some_failed)


def check_words(description: str, argv: Sequence[str] | None = None) -> int:
    """Run tools/check_dataset.py for sets of words; 1 where something is wrong with them."""
    parser = program_parser(description)
    entry = {"nargs": "+", "action": "append", "default": [], "metavar": ("PATH", "OTHER")}
    parser.add_argument("--words", **entry, help="a training set (may be repeated)")
    parser.add_argument("--val-words", **entry, help="an evaluation set (may be repeated)")
    parser.add_argument("--width", type=int, default=100, help="DATA.WORD_SIZE's; default 100")
    parser.add_argument("--no-images", action="store_true", help="decode no image")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="that decode; default: cores")
    args = parser.parse_args(argv)
    for given in (*args.words, *args.val_words):
        if len(given) > 2:
            raise InputError(f"expected PATH, or PATH and OTHER, found {' '.join(given)}.")
    for name, least in (("width", 16), ("workers", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: expected at least {least}.")

    from pretrain.methods.seqclr.check import check_sets

    lines, sound = check_sets(
        args.words, args.val_words, args.width, 0 if args.no_images else args.workers
    )
    for line in lines:
        print(line)
    return 0 if sound else PROBLEMS_FOUND
