#!/usr/bin/env python
"""Draw predictions beside the truth: PNGs, and one HTML page that needs no other file.

python tools/visualize_results.py --truth coco annotations/val.json images \\
    --predictions output/detector/inference/coco_instances_results.json --output output/pictures

python tools/visualize_results.py --config-file configs/coco/mask_rcnn_R_50_FPN_2x.yaml \\
    --weights output/detector/model_final.pth --sample 200 --output output/pictures

Several detectors side by side: --predictions random=a.json pretrained=b.json. Right, wrong and
missed are by COCO's matching at an IoU of 0.5. Only what is in --classes is looked at, if given.
"""

import argparse

from virtex_d2.engine.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--truth", nargs=3, metavar=("TYPE", "FILE", "IMAGES"), help="coco, lvis or voc data set")
    add("--config-file", default="", metavar="FILE", help="YAML config file that names it instead")
    add("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    add("--predictions", nargs="+", default=[], metavar="[NAME=]FILE", help="results files")
    add("--weights", default="", metavar="FILE", help="a detector that predicts here, instead")
    add("--output", required=True, metavar="DIR", help="folder to write; new or empty")
    add("--score-threshold", type=float, default=0.5, help="default 0.5")
    add("--num-images", type=int, default=24, help="how many are drawn (default 24)")
    add(
        "--sort",
        default="errors",
        help="errors, missed, wrong, right, file, random (default errors)",
    )
    add("--classes", nargs="+", default=[], metavar="NAME", help="look at these classes only")
    add("--iou", type=float, default=0.5, help="from which a prediction is right (default 0.5)")
    add("--by", choices=("auto", "bbox", "segm"), default="auto", help="match boxes or masks")
    add("--sample", type=int, default=0, help="judge so many images only, drawn by the seed")
    add("--seed", type=int, default=0)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args()
    from_config = bool(args.config_file or args.opts)
    if from_config == bool(args.truth):
        raise InputError("name the data set with --truth or with --config-file: one way.")
    if bool(args.weights) == bool(args.predictions):
        raise InputError("give --predictions or --weights: one of them.")
    if args.weights and not from_config:
        raise InputError("--weights needs the detector's --config-file, which names the data, too.")
    return args


def main() -> None:
    args = parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.checkpoint.transfer import apply_preprocessing, open_weights
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.datasets import register_datasets
    from virtex_d2.detection.modeling import resolve_norms
    from virtex_d2.engine.config import load_config
    from virtex_d2.engine.device import resolve_device
    from virtex_d2.studies.viewer.main import Options, read_truth, run, truth_of_config

    options = Options(
        output=args.output,
        score_threshold=args.score_threshold,
        num_images=args.num_images,
        sort=args.sort,
        classes=args.classes,
        iou=args.iou,
        by=args.by,
        sample=args.sample,
        seed=args.seed,
    )
    if args.truth:
        run(read_truth(args.truth), args.predictions, options)
        return
    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
    table = truth_of_config(cfg, args.dataset)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
        cfg.DATASETS.TEST = (table.name,)
        apply_preprocessing(cfg, open_weights(cfg))
        register_datasets(cfg, eval_only=True)
        cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
        resolve_norms(cfg)
    run(table, args.predictions, options, cfg, args.weights)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
