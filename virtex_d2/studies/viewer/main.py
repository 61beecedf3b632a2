"""Draw predictions beside the truth: PNGs, and one HTML page that needs no other file.

python tools/visualize_results.py --truth coco annotations/val.json images \\
    --predictions output/detector/inference/coco_instances_results.json --output output/pictures

python tools/visualize_results.py --config-file configs/coco/mask_rcnn_R_50_FPN_2x.yaml \\
    --weights output/detector/model_final.pth --sample 200 --output output/pictures

Several detectors side by side: --predictions random=a.json pretrained=b.json. Right, wrong and
missed are by COCO's matching at an IoU of 0.5. Only what is in --classes is looked at, if given.
"""

import argparse
from collections.abc import Sequence

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError

ORDERS = ("errors", "missed", "wrong", "right", "file", "random")


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what is out of its range."""
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--truth", nargs=3, metavar=("TYPE", "FILE", "IMAGES"), help="coco, lvis or voc data set")
    add("--config-file", default="", metavar="FILE", help="YAML config file that names it instead")
    add("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    add("--predictions", nargs="+", default=[], metavar="[NAME=]FILE", help="results files")
    add("--weights", default="", metavar="FILE", help="a detector that predicts here, instead")
    add("--output", required=True, metavar="DIR", help="folder to write; new or empty")
    add("--score-threshold", type=float, default=0.5, help="default 0.5")
    add("--num-images", type=int, default=24, help="how many are drawn (default 24)")
    add("--sort", choices=ORDERS, default="errors", help="which come first (default errors)")
    add("--classes", nargs="+", default=[], metavar="NAME", help="look at these classes only")
    add("--iou", type=float, default=0.5, help="from which a prediction is right (default 0.5)")
    add("--by", choices=("auto", "bbox", "segm"), default="auto", help="match boxes or masks")
    add("--sample", type=int, default=0, help="judge so many images only, drawn by the seed")
    add("--seed", type=int, default=0)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(words)
    from_config = bool(args.config_file or args.opts)
    if from_config == bool(args.truth):
        raise InputError("name the data set with --truth or with --config-file: one way.")
    if bool(args.weights) == bool(args.predictions):
        raise InputError("give --predictions or --weights: one of them.")
    if args.weights and not from_config:
        raise InputError("--weights needs the detector's --config-file, which names the data, too.")
    for flag, value in (("--score-threshold", args.score_threshold), ("--iou", args.iou)):
        if not 0 <= value <= 1:
            raise InputError(f"{flag} {value}: expected a number from 0 to 1.")
    for flag, value, least in (("--num-images", args.num_images, 1), ("--sample", args.sample, 0)):
        if value < least:
            raise InputError(f"{flag} {value}: expected at least {least}.")
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(words)
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.checkpoint.transfer import apply_preprocessing, open_weights
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.datasets import register_datasets, register_entries
    from virtex_d2.detection.modeling import resolve_norms
    from virtex_d2.detection.sources import read_catalog
    from virtex_d2.engine.config import load_config
    from virtex_d2.engine.device import resolve_device
    from virtex_d2.studies.viewer.gallery import read_truth, show

    if args.truth:
        show(read_truth(args.truth), args)
        return
    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
    register_entries(cfg)
    if not args.dataset and not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty; name the data set with --dataset.")
    table = read_catalog(args.dataset or cfg.DATASETS.TEST[0])
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
        cfg.DATASETS.TEST = (table.name,)
        apply_preprocessing(cfg, open_weights(cfg))
        register_datasets(cfg, eval_only=True)
        cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
        resolve_norms(cfg)
    show(table, args, cfg)
