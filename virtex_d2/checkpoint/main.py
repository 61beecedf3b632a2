"""The command line of tools/convert_checkpoint.py."""

import argparse
import json
from collections.abc import Mapping

from virtex_d2.checkpoint.layouts import LAYOUTS, SUFFIXES
from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError


def main(about: str) -> None:
    """Parse the command line, of which `about` is the description, and do what it says."""
    args = _parse_args(about)
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.checkpoint.convert import convert, inspect, verify

    which = (args.layout, args.copy, args.prefix)
    if args.inspect:
        result = inspect(args.source, *which)
    else:
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


def _parse_args(about: str) -> argparse.Namespace:
    parser = program_parser(about)
    parser.add_argument("source", help="a checkpoint: .pth, .pt, .tar, .safetensors, .pkl")
    parser.add_argument("dest", nargs="?", help="the file to write; not needed with --inspect")
    parser.add_argument("--to", choices=SUFFIXES, default="backbone", help="default: backbone")
    names = ", ".join(layout.name for layout in LAYOUTS)
    parser.add_argument("--layout", default="", help=f"where keys do not decide: {names}")
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


def describe(found: Mapping[str, object]) -> str:
    """A result as a table."""
    rows = []
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
        elif isinstance(value, list):
            texts = [
                f"{item['place'] or 'top level'} {item['prefix'] or '(no prefix)'} "
                f"{' or '.join(item['layouts']) or 'no known layout'}"
                if isinstance(item, dict)
                else str(item)
                for item in value
            ]
            more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
            value = "; ".join(texts[:4]) + more or "none"
        rows.append(f"{key:14}{'the file does not say' if value is None else value}")
    return "\n".join(rows)
