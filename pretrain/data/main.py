"""The main of tools/prepare_images.py, which parses its arguments before it imports anything."""

import logging
import os
import signal
import sys
from collections import Counter

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import exit_on_input_error


def main(description: str) -> int:
    """Run tools/prepare_images.py; returns its exit code."""
    signal.signal(signal.SIGTERM, _end)
    parser = program_parser(description)
    parser.add_argument("--images", required=True, help="folder of images, with its subfolders")
    parser.add_argument("--output", required=True, help="folder for the same names")
    parser.add_argument("--shorter-side", type=int, default=320, help="pixels; default 320")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs, 1 to 95; default 90")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes; default: one a core")
    args = parser.parse_args()

    from pretrain.data.prepare import Settings, prepare_folder

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with exit_on_input_error():
            settings = Settings(args.shorter_side, args.quality)
            outcomes = prepare_folder(args.images, args.output, settings, args.workers)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    counts = Counter(outcome.what for outcome in outcomes)
    before, after = (
        sum(getattr(outcome, which) for outcome in outcomes) / 1e6
        for which in ("bytes_before", "bytes_after")
    )
    print(
        f"{args.output}: {counts['resized']} images resized, {counts['copied']} copied, "
        f"{counts['unreadable']} unreadable; {counts['already']} were there before; "
        f"{before:.1f} MB -> {after:.1f} MB"
    )
    if set(counts) == {"copied"}:
        print(
            f"No shorter side has more than {args.shorter_side} pixels: the copies load no faster. "
            "--shorter-side says otherwise, for another folder."
        )
    return 1 if counts["unreadable"] else 0


def _end(number: int, frame: object) -> None:
    """End as Ctrl-C does: with all processes, and with nothing half-written left."""
    raise SystemExit(128 + number)
