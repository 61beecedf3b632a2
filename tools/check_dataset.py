#!/usr/bin/env python
"""Check a detection data set before training: annotations, image files, leakage; one page each.

python tools/check_dataset.py --train coco annotations/train.json images \\
    --val coco annotations/val.json images --contact-sheet sheet.png --output problems.csv

python tools/check_dataset.py --val voc datasets/VOC2007 test

python tools/check_dataset.py --config-file configs/coco/mask_rcnn_R_50_FPN_2x.yaml --no-images

A data set is the last three parts of an entry of VIRTEX.DATASETS: type (coco, lvis or voc),
annotation file (voc: folder), image folder (voc: split). With --config-file or KEY VALUE pairs the
data sets are those of DATASETS.TRAIN and DATASETS.TEST, and the detector is the config's; without,
it is one of boxes. Exit code: 0 no problems, and tools/train_net.py would start; 1 problems found;
2 bad usage. With several sets, a contact sheet is written for each: sheet-1.png, sheet-2.png, ...
"""

import argparse
import os

from virtex_d2.engine.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    entry = {"nargs": 3, "action": "append", "default": [], "metavar": ("TYPE", "FILE", "IMAGES")}
    parser.add_argument("--train", **entry, help="a training set (may be repeated)")
    parser.add_argument("--val", **entry, help="an evaluation set (may be repeated)")
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config file")
    parser.add_argument("--no-images", action="store_true", help="decode no image")
    parser.add_argument("--sample", type=int, default=0, help="decode so many of each set only")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that decode (default: the number of cores)",
    )
    parser.add_argument("--output", default="", metavar="FILE", help="all problems, .json or .csv")
    parser.add_argument("--contact-sheet", default="", metavar="PNG", help="images, drawn")
    parser.add_argument("--sheet-images", type=int, default=12, help="how many (default 12)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args()
    from_config = bool(args.config_file or args.opts)
    named = bool(args.train or args.val)
    if from_config == named:
        found = "both are given" if named else "neither is given"
        raise InputError(
            "expected the data sets either as --train or --val TYPE FILE IMAGES, or by "
            f"--config-file or KEY VALUE pairs; {found}."
        )
    return args


def main() -> int:
    args = parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.sources import read_annotations, read_config, source_name
    from virtex_d2.engine.config import load_config
    from virtex_d2.studies.check_dataset.main import Options, run
    from virtex_d2.studies.check_dataset.training import box_detector, refusal

    if args.config_file or args.opts:
        cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
        train, test = read_config(cfg)
    else:
        train, test = (
            [read_annotations(words, f"{role}: {source_name(words)}") for words in entries]
            for role, entries in (("train", args.train), ("val", args.val))
        )
        cfg = box_detector(list(zip(args.train, train)), list(zip(args.val, test)))
    options = Options(
        decode=not args.no_images,
        sample=args.sample,
        seed=args.seed,
        workers=args.workers,
        output=args.output,
        contact_sheet=args.contact_sheet,
        sheet_images=args.sheet_images,
    )
    return run(train, test, options, refusal(cfg))


if __name__ == "__main__":
    with exit_on_input_error():
        raise SystemExit(main())
