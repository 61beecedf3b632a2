"""A captioner of single shapes, from pixels to words: how often is it right about what it sees?

python benchmarks/caption_shapes.py --output output/shapes_captioner

Makes a world of images with one object each, pretrains on it (at 64 pixels, then from there at 96),
captions held-out images greedily, and counts the captions that name the object's class and its
colour, and no other. A finished training is not repeated. Some two and a half hours on a busy core.
"""

import argparse
import collections
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.methods.captioning.captioner import load_captioner  # noqa: E402
from pretrain.methods.captioning.decoding import build_decode  # noqa: E402
from virtex_d2.studies.shapes.world import (  # noqa: E402
    CLASSES,
    COLORS,
    render,
)
from virtex_d2.studies.shapes.write import write_dataset  # noqa: E402

SIZE = 96  # pixels
SEEDS = {"train": 1, "val": 2, "test": 3}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for data and run")
    parser.add_argument("--num-train", type=int, default=12000)
    parser.add_argument("--num-test", type=int, default=1000)
    args = parser.parse_args()

    world = args.output / "world"
    for split, number in (("train", args.num_train), ("val", 300), ("test", args.num_test)):
        if not (world / "annotations" / f"captions_{split}.json").exists():
            write_dataset(world, split, number, SIZE, SEEDS[split], max_objects=1)
    coarse, fine = args.output / "64px", args.output / "96px"
    pretrain(world, coarse, "shapes_captioner_R_18.yaml")
    weights = ("MODEL.WEIGHTS", coarse / "model_final.pth")
    words = ("DATA.TOKENIZER", coarse / "tokenizer.model")
    pretrain(world, fine, "shapes_captioner_R_18_96px.yaml", *weights, *words)
    for run in (coarse, fine):
        print(f"{run}:")
        judge(run, world / "images" / "test")


def judge(run: Path, images: Path) -> None:
    """Print how often the greedy captions of a run are right."""
    captioner = load_captioner(str(run))
    files = sorted(map(str, images.iterdir()))
    outcomes: collections.Counter[str] = collections.Counter()
    mistakes = 0
    for index, result in enumerate(captioner.caption_files(files, build_decode("greedy"), 50)):
        (seen,) = render(SEEDS["test"], index, SIZE, max_objects=1).objects
        words = set(re.findall("[a-z]+", result.caption))
        class_is_right = words & set(CLASSES) == {seen.name}
        colour_is_right = words & set(COLORS) == {seen.color}
        outcomes["class"] += class_is_right
        outcomes["colour"] += colour_is_right
        outcomes["colour and class"] += class_is_right and colour_is_right
        if not (class_is_right and colour_is_right) and (mistakes := mistakes + 1) <= 10:
            print(f"{result.file}: {seen.color} {seen.name}: {result.caption!r}")
    for what, count in outcomes.items():
        print(f"{what} right: {count} of {len(files)} ({100 * count / len(files):.1f} %)")


def pretrain(world: Path, run: Path, config: str, *overrides: object) -> None:
    """Train, or find trained."""
    if (run / "model_final.pth").exists():
        return
    options = [*overrides, "OUTPUT_DIR", run]
    for split in ("train", "val"):
        options += [f"DATA.{split.upper()}_IMAGES", world / "images" / split]
        annotations = world / "annotations" / f"captions_{split}.json"
        options += [f"DATA.{split.upper()}_CAPTIONS", annotations]
    tool, folder = ROOT / "tools" / "pretrain_net.py", ROOT / "configs" / "pretrain"
    command = [sys.executable, tool, "--resume", "--config-file", folder / config, *options]
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
