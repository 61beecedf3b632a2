"""The command line of tools/restore_images.py. Parses its arguments before it imports torch."""

import argparse

from virtex_d2.engine.cli import program_parser


def restore_images(description: str) -> None:
    """Run tools/restore_images.py."""
    parser = program_parser(description)
    add = parser.add_argument
    add("checkpoint", help="a released IPT_*.pt, a restorer.safetensors, or the folder of a run")
    add("images", metavar="IN", help="an image, or a folder of them (with subfolders)")
    add("output", metavar="OUT", help="the folder to write to")
    add("--task", default="", help="x2, x3, x4, derain, noise30, ...; default: the only one")
    add("--ensemble", action="store_true", help="mean of eight turned copies: 8 times as long")
    add(
        "--stride",
        type=int,
        choices=(12, 36),
        default=12,
        help="pixels between tiles of 48 pixels, in proportion for others: 12 (default) is the "
        "released rule, 36 an eighth of its work",
    )
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument("--reference", metavar="FOLDER", help="clean images, to score the results")
    truth.add_argument(
        "--degrade",
        nargs="?",
        const="",
        metavar="TASK",
        help="IN are clean images: degrade them first, as for --task or another one (noise70)",
    )
    add("--pictures", metavar="FOLDER", help="draw input, result and truth, a PNG each")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--keep", action="store_true", help="keep results of the same command")
    existing.add_argument("--overwrite", action="store_true", help="replace existing files")
    add("--batch-size", type=_positive, default=16, metavar="N", help="tiles at a time; default 16")
    add("--heads", type=_positive, metavar="N", help="of attention, if the checkpoint cannot say")
    add(
        *("--device",),
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: CUDA if there is",
    )
    args = parser.parse_args()

    from pretrain.methods.ipt.files import read_restorer
    from pretrain.methods.ipt.restore import Plan, restore

    restorer = read_restorer(args.checkpoint, args.heads)
    task, number = restorer.find(args.task)
    plan = Plan(
        task=task,
        number=number,
        images=args.images,
        output=args.output,
        reference=args.reference,
        degraded=args.degrade,
        pictures=args.pictures,
        stride=args.stride,
        ensemble=args.ensemble,
        keep=args.keep,
        overwrite=args.overwrite,
        batch_size=args.batch_size,
    )
    table = restore(restorer, plan, args.device)
    if table:
        print(table)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number
