#!/usr/bin/env python
"""Write a split of the synthetic captioned world, or a contact sheet of it.

python tools/make_shapes.py --output shapes --split train --num-images 1000 --size 128 --seed 1

How long that takes on one core (about 5 s): put `time taskset -c 0` before it.
"""

import argparse

from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.studies.shapes.options import FORMATS, MOST_OBJECTS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder of the world")
    parser.add_argument("--split", default="train", help="name of the split (default train)")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=128, help="side in pixels, 64 to 512")
    parser.add_argument("--seed", type=int, default=0, help="another one for each split")
    parser.add_argument("--max-objects", type=int, default=MOST_OBJECTS)
    parser.add_argument("--format", nargs="+", default=["coco"], metavar="|".join(FORMATS))
    parser.add_argument("--overwrite", action="store_true", help="replace the split if it exists")
    parser.add_argument("--contact-sheet", metavar="PNG", help="also draw the first 12 images")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # after parsing: --help need not wait for numpy and OpenCV
    from virtex_d2.studies.shapes.write import write_dataset

    write_dataset(
        args.output,
        args.split,
        args.num_images,
        args.size,
        args.seed,
        args.format,
        args.max_objects,
        args.overwrite,
    )
    print(f"{args.output}: split {args.split}, {args.num_images} images, {', '.join(args.format)}")
    if args.contact_sheet:
        from virtex_d2.studies.shapes.sheet import draw_contact_sheet  # imports matplotlib: slow

        count = min(12, args.num_images)
        draw_contact_sheet(args.contact_sheet, args.seed, args.size, args.max_objects, count)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
