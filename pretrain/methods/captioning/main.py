"""The mains of the captioning tools: caption images, score captions, train a vocabulary.

Each parses its arguments before it imports torch.
"""

import dataclasses
import json
import os
import sys

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError


def caption_images(description: str) -> int:
    """Run tools/caption_images.py; 1 where some images cannot be decoded."""
    parser = program_parser(description)
    parser.add_argument("model", help="the folder of a pretraining run, or a checkpoint")
    parser.add_argument(
        "images", nargs="+", help='files, folders (with subfolders), "-" for paths on stdin'
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="default: beside it")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="default: beside it")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--attention", metavar="DIR", help="draw where the model looked, a PNG each"
    )
    parser.add_argument("--decode", choices=("beam", "nucleus", "greedy"), default="beam")
    parser.add_argument("--beam-size", type=int, default=5, help="default 5")
    parser.add_argument("--top-p", type=float, default=0.9, help="of nucleus sampling; default 0.9")
    parser.add_argument("--temperature", type=float, default=1.0, help="of nucleus sampling")
    parser.add_argument("--seed", type=int, default=0, help="of nucleus sampling; default 0")
    parser.add_argument("--max-words", type=int, help="default: as many as the model can")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time; default 16")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if there is"
    )
    args = parser.parse_args()

    from pretrain.methods.captioning.captioner import list_images, load_captioner
    from pretrain.methods.captioning.decoding import build_decode
    from pretrain.methods.captioning.pictures import PictureFolder

    decode = build_decode(
        args.decode,
        beam_size=args.beam_size,
        top_p=args.top_p,
        temperature=args.temperature,
        seed=args.seed,
        max_words=args.max_words,
        with_attention=args.attention is not None,
    )
    pictures = PictureFolder(args.attention) if args.attention else None
    captioner = load_captioner(args.model, args.config_file, args.tokenizer, args.device)
    some_failed = False
    images = list_images(args.images, sys.stdin)
    for result in captioner.caption_files(images, decode, args.batch_size):
        if result.error:
            some_failed = True
            print(f"{result.file}: cannot be decoded: {result.error}", file=sys.stderr)
            continue
        entry = {
            "file": result.file,
            "caption": result.caption,
            "logprob": result.decoded.logprob,
            "tokens": result.decoded.tokens,
        }
        if pictures:
            entry["attention"] = pictures.save(
                result.file, captioner.tokenizer, result.decoded, result.caption
            )
        as_text = f"{result.file}\t{result.caption}"
        print(json.dumps(entry) if args.format == "json" else as_text, flush=True)
    return int(some_failed)


def evaluate_captions(description: str) -> None:
    """Run tools/evaluate_captions.py."""
    parser = program_parser(description)
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
    args = parser.parse_args()

    from pretrain.methods.captioning.metrics import (
        read_predictions,
        read_references,
        score_captions,
    )

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


def build_vocabulary(description: str) -> None:
    """Run tools/build_vocabulary.py."""
    parser = program_parser(description)
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
    args = parser.parse_args()

    from pretrain.data.formats import Source, load_records
    from pretrain.methods.captioning.tokenizer import (
        Tokenizer,
        merge_warning,
        summarise,
        train_tokenizer,
    )

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
