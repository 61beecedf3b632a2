"""What the demo runs, each a tool of the project as a user would run it, and what it shows.

A world of images, then for each seed a caption pretraining and two detectors, which are reported as
a comparison of two starts. Scale 1 is what the two config files say; another scale multiplies what
they count in iterations, and the captioned images.
"""

import ast
import contextlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json
from virtex_d2.engine.identity import flat
from virtex_d2.studies import curves, stages
from virtex_d2.studies.compare import figures
from virtex_d2.studies.compare.report import write_report
from virtex_d2.studies.compare.runs import Cell, read_run
from virtex_d2.studies.compare.tables import Block, text_table, verdicts
from virtex_d2.studies.page import Picture
from virtex_d2.studies.stages import Stage
from virtex_d2.studies.viewer.drawing import grid

PRETRAIN_CONFIG = "configs/pretrain/shapes_R_50.yaml"
DETECT_CONFIG = "configs/shapes/mask_rcnn_R_50_FPN.yaml"

IMAGE_SIZE = 96  # pixels: what two cores train on in minutes
MAX_OBJECTS = 3  # an image: with the world's six, minutes are too short for any detector to learn
FEWEST_IMAGES = 32  # at small scales: still enough captions for the tokenizer
# Images of each split at scale 1; more than 1 adds captioned ones alone: few labels are what
# pretraining is for.
IMAGES = {"captions": 6000, "train": 300, "test": 200}
# Different seeds of the world: no image of one split is in another.
SPLIT_SEEDS = {"captions": 1, "train": 2, "test": 3}
STARTS = {"random": "random", "pretrained": "caption-pretrained"}  # run's folder -> name
_WHAT = {
    "captions": "captioned images for pretraining",
    "train": "labelled images for the detectors",
    "test": "held-out images",
}
# Keys that are counted in iterations, with the least that each can be.
_COUNTED = {"SOLVER.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.EVAL_PERIOD": 2}
_COUNTED_BELOW_1 = {"TEST.PRECISE_BN.NUM_ITER": 1}  # a longer run does not need more of them


@dataclass(frozen=True)
class Training:
    """A config's training at some scale."""

    config: str  # its file
    # iterations, images_per_batch: SOLVER.MAX_ITER and SOLVER.IMS_PER_BATCH
    iterations: int
    images_per_batch: int
    overrides: tuple[str, ...]  # ("KEY", "VALUE", ...) that give it this length

    def __str__(self) -> str:
        count, images = self.iterations, self.images_per_batch
        return f"{count} iterations of {images} images ({self.config})"


@dataclass(frozen=True)
class Plan:
    """All stages in order, and where each result will lie."""

    images: Mapping[str, int]  # how many of each split
    # pretrain, detect: the trainings
    pretrain: Training
    detect: Training
    seeds: Sequence[int]  # of the repetitions
    folder: str  # of the demo, as in `Stage.folder`

    @property
    def world(self) -> str:
        """The folder of the images."""
        return f"{self.folder}/world"

    @property
    def stages(self) -> list[Stage]:
        """Three splits of the world, then for each seed one pretraining and two detectors.

        A seed sets the initialisation, the order of the images and their augmentation, in
        pretraining and in both detectors; the images are the same for all.
        """
        splits = {
            split: world_stage(self.world, split, count) for split, count in self.images.items()
        }
        planned = list(splits.values())
        for seed in self.seeds:
            pretraining = self._pretraining(seed, (splits["captions"], splits["test"]))
            labelled = splits["train"], splits["test"]
            detectors = [self._detector(seed, start, labelled, pretraining) for start in STARTS]
            planned += [pretraining, *detectors]
        return planned

    def run_folder(self, seed: int, run: str) -> str:
        """Name the OUTPUT_DIR of a run: "pretrain", or one of `STARTS` for a detector."""
        return f"{self.folder}/runs/seed{seed}/{run}"

    def files(self, kind: str, split: str) -> tuple[str, str]:
        """Name a split's annotations, "captions" or "instances", and the folder of its images."""
        return f"{self.world}/annotations/{kind}_{split}.json", f"{self.world}/images/{split}"

    def _pretraining(self, seed: int, needs: tuple[Stage, ...]) -> Stage:
        folder, training = self.run_folder(seed, "pretrain"), self.pretrain
        train, train_images = self.files("captions", "captions")
        val, val_images = self.files("captions", "test")
        return Stage(
            name=f"seed{seed}-pretrain",
            title=f"Seed {seed}: caption pretraining of a ResNet-50, {training.iterations} "
            "iterations",
            command=(
                *("tools/pretrain_net.py", "--config-file", training.config),
                *("OUTPUT_DIR", folder, "SEED", str(seed)),
                *("DATA.TRAIN_CAPTIONS", train, "DATA.TRAIN_IMAGES", train_images),
                *("DATA.VAL_CAPTIONS", val, "DATA.VAL_IMAGES", val_images),
                *training.overrides,
            ),
            folder=folder,
            configs=(training.config,),
            needs=needs,
        )

    def _detector(
        self, seed: int, start: str, world: tuple[Stage, ...], pretraining: Stage
    ) -> Stage:
        folder, training = self.run_folder(seed, start), self.detect
        weights, source, needs = "", "random weights", world
        if start == "pretrained":
            weights = f"{pretraining.folder}/backbone.safetensors"
            source, needs = "the caption-pretrained backbone", (*world, pretraining)
        data_sets = [
            [f"shapes_{split}", "coco", *self.files("instances", split)]
            for split in ("train", "test")
        ]
        return Stage(
            name=f"seed{seed}-{start}",
            title=f"Seed {seed}: Mask R-CNN from {source}, {training.iterations} iterations",
            command=(
                *("tools/train_net.py", "--config-file", training.config),
                *("OUTPUT_DIR", folder, "SEED", str(seed), "MODEL.WEIGHTS", weights),
                *("VIRTEX.DATASETS", repr(data_sets)),
                *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"),
                *training.overrides,
            ),
            folder=folder,
            configs=(training.config,),
            needs=needs,
            label=start,
            group=f"seed{seed}-detectors",  # two of half the threads are faster than one
        )


def make_plan(root: Path, output: Path, scale: float, num_seeds: int) -> Plan:
    """Plan a demo; seeds are 1 to `num_seeds`, so that a longer one contains a shorter one."""
    if not 0 < scale < float("inf"):
        raise InputError(f"--scale {scale}: expected a positive number; 1 is the default budget.")
    if num_seeds < 1:
        raise InputError(f"--seeds {num_seeds}: expected at least 1.")
    return Plan(
        {
            split: max(
                FEWEST_IMAGES, round(count * (scale if split == "captions" else min(scale, 1)))
            )
            for split, count in IMAGES.items()
        },
        _training(root, PRETRAIN_CONFIG, scale),
        _training(root, DETECT_CONFIG, scale),
        range(1, num_seeds + 1),
        str(output.relative_to(root)) if output.is_relative_to(root) else str(output),
    )


def world_stage(world: str, split: str, count: int) -> Stage:
    """Make the stage that draws a split of the world."""
    return Stage(
        name=f"world-{split}",
        title=f"Shapes: {count} {_WHAT[split]}",
        command=(
            "tools/make_shapes.py",
            *("--output", world, "--split", split),
            *("--num-images", str(count), "--size", str(IMAGE_SIZE)),
            *("--seed", str(SPLIT_SEEDS[split]), "--max-objects", str(MAX_OBJECTS)),
        ),
        folder=world,
        again="--overwrite",
    )


def _training(root: Path, path: str, scale: float) -> Training:
    get = dict(flat(stages.read_config(root / path))).get
    for key in ("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH"):
        if not isinstance(get(key), int):
            raise InputError(
                f"{root / path}: the demo needs {key} as a number here; found {get(key)!r}."
            )
    iterations = max(4, round(scale * get("SOLVER.MAX_ITER")))
    overrides = []
    if scale != 1:
        overrides += ["SOLVER.MAX_ITER", str(iterations)]
        for key, least in {**_COUNTED, **_COUNTED_BELOW_1}.items():
            if (value := get(key)) is not None:
                factor = min(scale, 1.0) if key in _COUNTED_BELOW_1 else scale
                overrides += [key, str(max(least, round(factor * value)))]
        if (steps := get("SOLVER.STEPS")) is not None:
            steps = ast.literal_eval(steps) if isinstance(steps, str) else steps
            # Each below the length and none twice, or detectron2 refuses them.
            scaled = {min(iterations - 1, max(1, round(scale * step))) for step in steps}
            overrides += ["SOLVER.STEPS", repr(tuple(sorted(scaled)))]
    return Training(path, iterations, get("SOLVER.IMS_PER_BATCH"), tuple(overrides))


def run_demo(root: Path, output: Path, scale: float = 1.0, num_seeds: int = 1) -> Path:
    """Run what is not done yet, then write the report into `output`.

    Args:
        root: the project's folder, with tools/ and configs/.
        output: the demo's folder; new, or of an earlier demo of the same scale.
        scale: multiplies the iterations and the captioned images.
        num_seeds: repetitions of pretraining and both detectors.

    Returns:
        The report's path.

    Raises:
        StageFailedError: a stage failed; there is no report then.
    """
    root, output = root.resolve(), output.resolve()
    plan = make_plan(root, output, scale, num_seeds)
    if not (root / "tools").is_dir():
        raise InputError(f"{root}: expected the project's folder; it has no tools/.")
    stages.claim_output(output, "demo", {"scale": scale})
    (output / "report.html").unlink(missing_ok=True)  # it would not speak of this run
    count = len(plan.stages)
    cores = stages.cores()
    print(f"{count} stages into {output}, on {cores} cores. Commands run in {root}.", flush=True)
    markers = stages.run_stages(plan.stages, root, output)
    time = stages.clock(stages.elapsed(plan.stages, markers))

    print("\nReport", flush=True)
    path, blocks = _report(plan, root, output, markers, time)
    print(f"\n{text_table(blocks)}\n")
    print(*verdicts(blocks[0]), f"{time} in all. Report: {path}", sep="\n")
    return path


def _report(
    plan: Plan, root: Path, output: Path, markers: Mapping[str, Mapping[str, Any]], time: str
) -> tuple[Path, list[Block]]:
    pictures = output / "pictures"
    pictures.mkdir(exist_ok=True)
    captions, pretraining = pictures / "captions.png", pictures / "pretraining.png"
    _draw_captions(captions, *(root / name for name in plan.files("captions", "captions")))
    runs = (root / plan.run_folder(seed, "pretrain") / "metrics.json" for seed in plan.seeds)
    _draw_pretraining(pretraining, [curves.Metrics(run, plan.pretrain.iterations) for run in runs])
    images = plan.images
    path, blocks = write_report(
        output,
        list(STARTS.values()),
        [
            read_run(
                Cell(Path(DETECT_CONFIG).stem, 1.0, name, seed), root / plan.run_folder(seed, start)
            )
            for seed in plan.seeds
            for start, name in STARTS.items()
        ],
        commands={
            f"{stage.title} ({stages.clock(marker['seconds'])})": "OMP_NUM_THREADS="
            f"{marker['threads']} {marker['command']}"
            for stage in plan.stages
            for marker in [markers[stage.name]]
        },
        root=root,
        title="From captions to a detector",
        introduction="A ResNet-50 learns from captioned images of a synthetic world, without a "
        "single box or class label. It then starts a Mask R-CNN, against the same detector started "
        "at random, on images that neither has seen.",
        sections={
            "Caption pretraining": [Picture(captions, *_CAPTIONS), Picture(pretraining, *_LOSSES)]
        },
        facts={
            "World": f"{images['captions']} captioned images for pretraining; {images['train']} "
            f"labelled ones for the detectors; {images['test']} held out, for AP and for the "
            f"captions' validation loss; {IMAGE_SIZE} px each, disjoint",
            "Pretraining": str(plan.pretrain),
            "Detectors": f"{plan.detect}, the same for both starts",
            "Seeds": f"{', '.join(map(str, plan.seeds))}. A seed sets initialisation, order and "
            "augmentation of the pretraining and of both detectors; the images are the same for "
            "all. make demo DEMO_SEEDS=3 runs three",
            "Time": f"{time} for all stages; detectors run two at a time",
        },
    )
    overview = output / "overview.png"
    overview.unlink(missing_ok=True)
    with contextlib.suppress(InputError):  # the page says why there are no pictures of predictions
        _draw_overview(overview, blocks[0], root)
    return path, blocks


# What two pictures show, in words, and what is written below them.
_CAPTIONS = (
    "Captioned images of the synthetic world",
    "The first of the captioned images, with two of their five captions. This is all that the "
    "pretraining is given.",
)
_LOSSES = (
    "Caption loss of the forward and the backward direction against iteration",
    "The loss of predicting each next piece of the caption, forwards and backwards, from the image "
    "and the pieces before it. The dashed line is what knowing the pieces' frequencies, and no "
    "image, would give.",
)


def _draw_captions(path: Path, annotations: Path, images: Path, count: int = 4) -> None:
    """Draw the first captioned images, each with two of its captions: what pretraining sees."""
    coco = read_json(annotations)
    captions: dict[int, list[str]] = {}
    for item in coco["annotations"]:
        captions.setdefault(item["image_id"], []).append(f"“{item['caption']}”")
    with matplotlib.rc_context(curves.STYLE):
        figure = Figure(figsize=(curves.WIDTH, 3.4), layout="constrained")
        for axes, record in zip(figure.subplots(1, count), coco["images"]):
            axes.set_axis_off()
            with Image.open(images / record["file_name"]) as image:
                axes.imshow(image.convert("RGB"), interpolation="bicubic")
            texts = [textwrap.fill(text, 40) for text in captions.get(record["id"], [])[:2]]
            axes.text(0, -0.04, "\n".join(texts), transform=axes.transAxes, va="top", fontsize=7.5)
        curves.save(figure, path, photographs=True)


def _draw_pretraining(path: Path, runs: Sequence[curves.Metrics]) -> None:
    """Draw the caption loss of each direction, of training and of held-out images."""
    with matplotlib.rc_context(curves.STYLE):
        figure = Figure(figsize=(curves.WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Caption loss, nats a token")
        labels = []
        for direction, color in (("forward", "#0A5FA5"), ("backward", "#3FA7D6")):
            key = f"loss_captioning_{direction}"
            end = curves.draw_seeds(axes, [run.curve(key) for run in runs], color)
            held_out = [run.curve(f"val/{key}") for run in runs if run.curve(f"val/{key}")]
            for curve in held_out:
                axes.plot(*zip(*curve.items()), "o", color=color, mfc="white", ms=5, zorder=4)
            if end is not None and held_out:
                last = sum([*curve.values()][-1] for curve in held_out) / len(held_out)
                labels.append((end, f"{direction} {end:.2f}\nheld out {last:.2f}", color))
        if entropy := [*runs[0].curve("val/unigram_entropy").values()]:
            axes.axhline(entropy[-1], color=curves.MUTED, lw=1, ls=(0, (5, 3)), zorder=1)
            labels.append((entropy[-1], "word frequencies alone\n(unigram entropy)", curves.MUTED))
        curves.finish(axes, labels)
        words = "iteration    (lines: training images, with augmentation; circles: held-out images)"
        axes.set_xlabel(words)
        curves.save(figure, path)


def _draw_overview(path: Path, block: Block, root: Path) -> None:
    """Draw mask AP beside predicted masks, in one picture for a README."""
    _, rows = figures.prediction_panels(block, root, count=4)
    sheet = grid([panel for column in zip(*rows) for panel in column], columns=len(rows))
    metric = block.main[-1]
    with matplotlib.rc_context(curves.STYLE):
        figure = Figure(figsize=(curves.WIDTH, 4.8))
        left, right = (
            figure.add_axes(box) for box in ((0.04, 0.1, 0.21, 0.84), (0.38, 0, 0.62, 1))
        )
        figures.draw_curve(left, block, metric, f"{metric.label} on held-out images")
        right.set_axis_off()
        right.imshow(sheet, interpolation="lanczos")
        curves.save(figure, path, photographs=True)
    with Image.open(path) as image:  # with a palette it takes a quarter of the space
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
