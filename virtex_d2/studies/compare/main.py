"""Train the same detector from several initialisations, and report which is better by how much.

python tools/compare_inits.py --output output/comparison \\
    --config-file configs/voc/faster_rcnn_R_50_C4_07.yaml \\
    --init random --init virtex=output/pretrain/backbone.safetensors \\
    --init imagenet=R-50.pth --seeds 1 2 3 --fractions 1 0.1

"Did it help?", cheap questions first: SVMs on frozen features, frozen backbones, whole detectors:

python tools/compare_inits.py --output output/quick --preset quick \\
    --config-file configs/coco/mask_rcnn_R_50_FPN_person_small.yaml \\
    --captions captions_train.json images \\
    --init random --init virtex=output/pretrain/backbone.safetensors

What is finished is not run again; the same command goes on from where it stopped. {seed} in a
checkpoint's path stands for the seed. As a job array: --list prints the runs, --only N does one of
them, --report-only writes the report from what is there. Runs that were trained elsewhere:

python tools/compare_inits.py --output output/report \\
    --collect random='output/coco_random_seed*' --collect virtex='output/coco_virtex_seed*'
"""

import argparse
from pathlib import Path

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError, exit_on_input_error


@exit_on_input_error()
def main(root: Path) -> None:
    """Run tools/compare_inits.py, in the project's folder `root`."""
    args = _parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.studies.stages import exit_on_stop

    with exit_on_stop():
        _compare(args, root)


def _compare(args: argparse.Namespace, root: Path) -> None:
    from virtex_d2.studies.compare.comparison import Comparison, report_collected
    from virtex_d2.studies.compare.plan import PRESET_SEEDS, check_plan, make_plan, parse_inits
    from virtex_d2.studies.compare.tables import judgements, text_table

    probes = []
    if args.collect:
        path, blocks = report_collected(args.output, args.collect, args.baseline)
    else:
        plan = make_plan(
            args.config_file,
            parse_inits(args.init, args.init_opts),
            args.fractions,
            args.seeds or (PRESET_SEEDS if args.preset else [1]),
            args.opts,
            args.baseline,
            args.num_gpus,
            root,
            args.preset,
        )
        captions = tuple((file, images) for file, images in args.captions)
        comparison = Comparison(plan, root, args.output.resolve(), captions)
        if args.list:
            check_plan(plan, root)
            for number, command in enumerate(comparison.commands().values()):
                print(f"{number}\t{command}")
            return
        if not args.report_only:
            comparison.run(args.jobs, args.only)
        if args.only is not None:
            return
        path, blocks = comparison.report()
        probes = comparison.probes()
    told = "\n".join(["Did it help?", *judgements(blocks)])
    print(f"\n{text_table(blocks, probes)}\n\n{told}\n\nReport: {path}")


def _parse_args() -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args()
    if args.collect:  # of finished runs no flag says how to train
        defaults = parser.parse_args(["--output", str(args.output)])
        given = [
            f"--{name.replace('_', '-')}"
            for name, value in vars(args).items()
            if name not in ("output", "collect", "baseline") and value != getattr(defaults, name)
        ]
        if given:
            raise InputError(
                "--collect: reads finished runs, which say themselves how they were trained; leave "
                f"{', '.join(given)} out."
            )
    elif not args.config_file:
        raise InputError("--config-file: name at least one config of tools/train_net.py.")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the comparison")
    add(
        "--config-file",
        "--config-files",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="configs of tools/train_net.py; each is a comparison of its own in the report",
    )
    add(
        "--init",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="an initialisation, random or random_zero_scales; repeat it for each",
    )
    add(
        "--init-opts",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME KEY VALUE",
        help="config overrides for one initialisation alone; the report names such differences",
    )
    add(
        "--fractions",
        type=float,
        nargs="+",
        action="extend",
        default=[],
        help="of the training images (default: VIRTEX.FRACTION of the config)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        action="extend",
        default=[],
        help="one run of each start for every seed (default 1; of a preset 1 to 5)",
    )
    add(
        "--preset",
        choices=("quick",),
        default="",
        help="quick: first SVMs on the features of each start, then detectors on its frozen "
        "backbone, then whole ones",
    )
    add(
        "--captions",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "IMAGES"),
        help="captions (COCO's format) that starts were pretrained on, and the folder of their "
        "images: those that are test images are named; may be repeated",
    )
    add("--baseline", default="", metavar="NAME", help="default: random, else the first --init")
    add("--num-gpus", type=int, default=1, help="of one run (default 1)")
    add("--jobs", type=int, default=0, help="runs at the same time (default: as GPUs allow)")
    add("--list", action="store_true", help="print the runs with their numbers, run nothing")
    add("--only", type=int, metavar="N", help="do run N of --list alone, without a report")
    add("--report-only", action="store_true", help="report on what is finished, run nothing")
    add(
        "--collect",
        action="append",
        default=[],
        metavar="NAME=FOLDERS",
        help="instead of running: finished runs of one initialisation, a pattern of OUTPUT_DIRs",
    )
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides for all runs, e.g. SOLVER.MAX_ITER 1000; after everything else",
    )
    return parser
