#!/usr/bin/env python
"""Caption images with a pretrained model; a line each on standard output, in their order.

python tools/caption_images.py output/pretrain photo.jpg more_photos
python tools/caption_images.py output/pretrain photos --attention looks --decode greedy
find . -name '*.jpg' | python tools/caption_images.py output/pretrain - --format json
python tools/caption_images.py virtex.pth photo.jpg --config-file config.yaml --tokenizer coco.model

Exit codes: 0 all images are captioned; 1 some cannot be decoded (named on standard error); 2 the
model or an argument cannot be used.
"""

import argparse
import json
import signal
import sys


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # after parsing: --help need not wait for torch
    from pretrain.methods.captioning.captioner import list_images, load_captioner
    from pretrain.methods.captioning.decoding import build_decode
    from pretrain.methods.captioning.pictures import PictureFolder
    from virtex_d2.engine.errors import exit_on_input_error

    with exit_on_input_error():
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
        images = list_images(args.images, sys.stdin)
        some_failed = False
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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    for stream in (sys.stdin, sys.stdout):  # names of files need not be text
        stream.reconfigure(errors="surrogateescape")
    try:
        code = main()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    raise SystemExit(code)
