"""tools/check_dataset.py: reads, checks, prints, and says whether all is well."""

import argparse
import os
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from virtex_d2.annotations.table import AnnotationTable

PROBLEMS_FOUND = 1  # exit code


def parse_args(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and refuse what does not go together."""
    parser = program_parser(description)
    entry = {"nargs": 3, "action": "append", "default": [], "metavar": ("TYPE", "FILE", "IMAGES")}
    add = parser.add_argument
    add("--train", **entry, help="a training set (may be repeated)")
    add("--val", **entry, help="an evaluation set (may be repeated)")
    add("--config-file", default="", metavar="FILE", help="YAML config file")
    add("--no-images", action="store_true", help="decode no image")
    add("--sample", type=int, default=0, help="decode so many of each set only")
    add("--seed", type=int, default=0, help="of the samples (default 0)")
    cores = len(os.sched_getaffinity(0))
    workers = "processes that decode (default: the number of cores)"
    add("--workers", type=int, default=cores, help=workers)
    add("--output", default="", metavar="FILE", help="all problems, .json or .csv")
    add("--contact-sheet", default="", metavar="PNG", help="images, drawn")
    add("--sheet-images", type=int, default=12, help="how many (default 12)")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    named = bool(args.train or args.val)
    if bool(args.config_file or args.opts) == named:
        found = "both are given" if named else "neither is given"
        raise InputError(
            "expected the data sets either as --train or --val TYPE FILE IMAGES, or by "
            f"--config-file or KEY VALUE pairs; {found}."
        )
    for name, least in (("sample", 0), ("sheet_images", 1), ("workers", 1)):
        if (value := getattr(args, name)) < least:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {value}: expected at least {least}.")
    if args.output and not args.output.endswith((".json", ".csv")):
        raise InputError(f"--output {args.output}: expected a name that ends in .json or .csv.")
    if args.contact_sheet and not args.contact_sheet.lower().endswith(".png"):
        raise InputError(
            f"--contact-sheet {args.contact_sheet}: is a PNG; expected a name that ends in .png."
        )
    return args


def main(description: str = "", argv: Sequence[str] | None = None) -> int:
    """Check data sets and print a page on each; training sets are held against evaluation sets.

    Returns:
        The exit code: 0, or 1 where there are serious problems or training would not start.
    """
    args = parse_args(description, argv)
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.annotations.checks import check, leaks
    from virtex_d2.studies.check_dataset.page import page, write_listing
    from virtex_d2.studies.check_dataset.sheet import draw_sheets

    cfg, train, test = _read(args)
    refused = _refusal(cfg)
    checked = [
        [check(each, not args.no_images, args.sample, args.seed, args.workers) for each in tables]
        for tables in (train, test)
    ]
    for first, second in product(*checked):
        second.problems += leaks(first, second)
    every = [*checked[0], *checked[1]]
    for each in every:
        print(page(each, bool(refused)), end="\n\n")
    if train and test:
        how = "by file and by content, pixel by pixel"
        if args.no_images:
            how = "by file and file name only; without --no-images also by content"
        elif args.sample:
            how = "by file and file name; by content among the sampled images only"
        print(f"Leakage between training and evaluation sets: compared {how}.")
        print("Photographs that were scaled or compressed anew are not found.")
    if refused:
        print(f"tools/train_net.py would not start on this: {refused}")
    if args.output:
        write_listing(args.output, every)
        print(f"all problems: {args.output}")
    if args.contact_sheet:
        for path in draw_sheets(args.contact_sheet, every, args.sheet_images, args.seed):
            print(f"contact sheet: {path}")
    return PROBLEMS_FOUND if refused or not all(each.sound for each in every) else 0


def _read(
    args: argparse.Namespace,
) -> "tuple[CfgNode, list[AnnotationTable], list[AnnotationTable]]":
    """Read training and evaluation sets; those of the command line get a detector of boxes."""
    from virtex_d2.annotations.voc import VOC_CLASSES, classes_in
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.datasets import register_entries
    from virtex_d2.detection.sources import read_annotations, read_catalog, source_name
    from virtex_d2.engine.config import load_config

    if args.config_file or args.opts:
        cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
        register_entries(cfg)
        if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
            raise InputError(
                "DATASETS.TRAIN and DATASETS.TEST are empty; name the data sets, for example "
                "DATASETS.TRAIN \"('name',)\"."
            )
        train, test = (list(map(read_catalog, cfg.DATASETS[key])) for key in ("TRAIN", "TEST"))
        return cfg, train, test
    cfg = get_virtex_cfg()
    cfg.MODEL.MASK_ON = False
    found = {}
    for key, role, sets in (("TRAIN", "train", args.train), ("TEST", "val", args.val)):
        found[key] = [read_annotations(words, f"{role}: {source_name(words)}") for words in sets]
        names = [f"check_dataset_{role}_{number}" for number in range(len(sets))]
        for name, words, table in zip(names, sets, found[key]):
            classes = []
            if table.kind == "voc" and tuple(table.categories.values()) != VOC_CLASSES:
                classes = [classes_in(words[1])]  # one split may lack a class
            cfg.VIRTEX.DATASETS.append([name, *words, *classes])
        cfg.DATASETS[key] = tuple(names)
    return cfg, found["TRAIN"], found["TEST"]


def _refusal(cfg: "CfgNode") -> str:
    """Say why training or evaluating on a config's data sets would not start; "" if it would."""
    from virtex_d2.detection.datasets import register_datasets

    try:
        register_datasets(cfg.clone(), eval_only=not cfg.DATASETS.TRAIN)
    except InputError as error:
        return str(error)
    return ""
