#!/usr/bin/env python
"""Prepare a folder of images once, so that every epoch loads them faster.

python tools/prepare_images.py --images train2017 --output train2017_320 --workers 8

Larger images become upright RGB with a shorter side of 320 pixels, and their JPEGs get a restart
marker after each block, between which the loader decodes only what a crop needs. Smaller ones are
copied as they are. Names stay, so that annotation files keep working: give the new folder as
DATA.TRAIN_IMAGES.

A run that was stopped or killed goes on with the same command. Images that cannot be decoded are
named and left out; the exit code is then 1.
"""

import argparse
import logging
import os
import signal
import sys


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="folder of images, with its subfolders")
    parser.add_argument("--output", required=True, help="folder for the same names")
    parser.add_argument("--shorter-side", type=int, default=320, help="pixels; default 320")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs, 1 to 95; default 90")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes; default: one a core",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # after parsing: --help need not wait for torch
    from pretrain.data.prepare import Settings
    from pretrain.data.prepared_folder import prepare_folder
    from virtex_d2.engine.errors import exit_on_input_error

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_on_input_error():
        settings = Settings(args.shorter_side, args.quality)
        summary = prepare_folder(args.images, args.output, settings, args.workers)
    counts = summary.counts
    print(
        f"{args.output}: {counts['resized']} images resized, {counts['copied']} copied, "
        f"{counts['unreadable']} unreadable; {summary.already} were there before; "
        f"{summary.bytes_before / 1e6:.1f} MB -> {summary.bytes_after / 1e6:.1f} MB"
    )
    if counts["copied"] and not counts["resized"]:
        print(
            f"No shorter side has more than {args.shorter_side} pixels: the copies load no faster. "
            "--shorter-side says otherwise, for another folder."
        )
    return 1 if counts["unreadable"] else 0


def _end(number: int, frame: object) -> None:
    """TERM ends this as Ctrl-C does: with its processes, and with nothing half-written left."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
