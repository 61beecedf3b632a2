#!/usr/bin/env python
"""Take the ResNet out of a checkpoint of any known layout, and write it for other programs.

python tools/convert_checkpoint.py moco_v2_800ep.pth.tar --inspect
python tools/convert_checkpoint.py moco_v2_800ep.pth.tar R-50.pkl --to detectron2 --verify
python tools/convert_checkpoint.py output/detector/model_final.pth resnet50.pth --to torchvision

Exit codes: 0 done; 2 the source or an argument cannot be used, and nothing is written, or --verify
found a difference; 1 anything else.
"""

import argparse
import json

from virtex_d2.checkpoint.layouts import LAYOUTS, SUFFIXES
from virtex_d2.engine.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a checkpoint: .pth, .pt, .tar, .safetensors, .pkl")
    parser.add_argument("dest", nargs="?", help="the file to write; not needed with --inspect")
    parser.add_argument("--to", choices=SUFFIXES, default="backbone", help="default: backbone")
    parser.add_argument(
        "--layout",
        default="",
        help=f"where keys do not decide: {', '.join(e.name for e in LAYOUTS)}",
    )
    parser.add_argument("--copy", default="", help="of several networks the one: teacher, ema, ...")
    parser.add_argument(
        "--prefix", default="", help="what stands before the names of the network: online.net."
    )
    parser.add_argument("--inspect", action="store_true", help="say what the source is, and stop")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if not args.inspect and not args.dest:
        raise InputError("DEST is missing: the file to write, or --inspect to write nothing.")
    return args


def main() -> None:
    args = parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.checkpoint.convert import convert, describe, inspect, verify

    if args.inspect:
        result = inspect(args.source, args.layout, args.copy, args.prefix)
        print(json.dumps(result, indent=1) if args.json else describe(result))
        return
    which = (args.layout, args.copy, args.prefix)
    backbone = convert(args.source, args.dest, args.to, *which, overwrite=args.overwrite)
    result = {
        "source": backbone.path,
        "dest": args.dest,
        "to": args.to,
        "layout": backbone.layout,
        "copy": backbone.copy,
        "architecture": backbone.architecture.name,
        "tensors": len(backbone.tensors),
        "notes": list(backbone.notes),
    }
    if args.verify:
        result["verified"] = verify(args.dest, backbone).errors
    print(json.dumps(result, indent=1) if args.json else describe(result))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
