"""Write a split of the synthetic captioned world, or a contact sheet of it.

python tools/make_shapes.py --output shapes --split train --num-images 1000 --size 128 --seed 1

How long that takes on one core (about 5 s): put `time taskset -c 0` before it.
"""

import textwrap
from collections.abc import Sequence

from virtex_d2.engine.cli import program_parser
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes import FORMATS, MOST_OBJECTS

_COLUMNS = 4


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, help="folder of the world")
    add("--split", default="train", help="name of the split (default train)")
    add("--num-images", type=int, default=1000)
    add("--size", type=int, default=128, help="side in pixels, 64 to 512")
    add("--seed", type=int, default=0, help="another one for each split")
    add("--max-objects", type=int, default=MOST_OBJECTS)
    add("--format", nargs="+", default=["coco"], metavar="|".join(FORMATS))
    add("--overwrite", action="store_true", help="replace the split if it exists")
    add("--contact-sheet", metavar="PNG", help="also draw the first 12 images")
    args = parser.parse_args(words)
    # after parsing: --help need not wait for numpy and OpenCV
    from virtex_d2.studies.shapes.write import write_dataset

    world = {"seed": args.seed, "size": args.size, "max_objects": args.max_objects}
    write_dataset(
        args.output,
        args.split,
        args.num_images,
        **world,
        formats=args.format,
        overwrite=args.overwrite,
    )
    print(f"{args.output}: split {args.split}, {args.num_images} images, {', '.join(args.format)}")
    if args.contact_sheet:
        draw_contact_sheet(args.contact_sheet, count=min(12, args.num_images), **world)


def draw_contact_sheet(
    path: str, seed: int, size: int = 128, max_objects: int = MOST_OBJECTS, count: int = 12
) -> None:
    """Draw the first `count` scenes of a world, the outlines of their masks and their captions,
    into a PNG, whose folder is made where absent.
    """
    from matplotlib.figure import Figure

    from virtex_d2.engine.files import atomic_path
    from virtex_d2.studies.shapes.world import render

    rows = -(-count // _COLUMNS)
    figure = Figure(figsize=(4.2 * _COLUMNS, 5.2 * rows))
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, axis in zip(range(count), axes.flat):
        scene = render(seed, index, size, max_objects)
        axis.imshow(scene.image)
        for item in scene.objects:
            axis.contour(item.mask, levels=[0.5], colors="white", linewidths=2.2)
            axis.contour(item.mask, levels=[0.5], colors="black", linewidths=0.9)
        lines = [textwrap.fill(f"- {text}", 58, subsequent_indent="  ") for text in scene.captions]
        axis.text(0, size * 1.02, "\n".join(lines), va="top", fontsize=7.5, family="monospace")
    figure.subplots_adjust(
        left=0.01, right=0.99, top=0.99, bottom=0.42 / rows, hspace=0.45, wspace=0.06
    )
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=90)
    except OSError as error:
        raise InputError(f"{path}: cannot write the contact sheet ({error.strerror}).") from error
