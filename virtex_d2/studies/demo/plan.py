"""What the demo runs: each stage's command, and its number of images and iterations.

Scale 1 is what the two config files say; another scale multiplies their iterations (and what is
counted in iterations), and the captioned images with them.
"""

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.pipeline.stage import Stage, read_config

PRETRAIN_CONFIG = "configs/pretrain/shapes_R_50.yaml"
DETECT_CONFIG = "configs/shapes/mask_rcnn_R_50_FPN.yaml"

IMAGE_SIZE = 96  # pixels: what two cores train on in minutes
MAX_OBJECTS = 3  # an image: with the world's six, minutes are too short for any detector to learn
CAPTION_IMAGES = 6000  # at scale 1; no labels but five captions each
LABELLED_IMAGES = 300  # at scale 1 and above: few labels are what pretraining is for
TEST_IMAGES = 200  # at scale 1 and above; held out from both
FEWEST_IMAGES = 32  # at small scales: still enough captions for the tokenizer

# Different seeds of the world: no image of one split is in another.
SPLIT_SEEDS = {"captions": 1, "train": 2, "test": 3}

STARTS = ("random", "pretrained")
_SOURCES = {"random": "random weights", "pretrained": "the caption-pretrained backbone"}


@dataclass(frozen=True)
class Schedule:
    """A training run's length; everything in iterations but the batch.

    Attributes:
        iterations: SOLVER.MAX_ITER.
        images_per_batch: SOLVER.IMS_PER_BATCH.
        overrides: ["KEY", "VALUE", ...] that give the config this length.
    """

    iterations: int
    images_per_batch: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """How much of everything the demo uses at one scale."""

    scale: float
    caption_images: int
    labelled_images: int
    test_images: int
    pretrain: Schedule
    detect: Schedule


@dataclass(frozen=True)
class Plan:
    """All stages in order, and where each result will lie (paths as in `Stage.folder`)."""

    budget: Budget
    seeds: tuple[int, ...]
    world: str
    runs: str
    stages: tuple[Stage, ...] = ()

    def run_folder(self, seed: int, run: str) -> str:
        """The OUTPUT_DIR of a run: "pretrain", or one of `STARTS` for a detector."""
        return f"{self.runs}/seed{seed}/{run}"

    def annotations(self, kind: str, split: str) -> str:
        """An annotation file of the world: kind "captions" or "instances"."""
        return f"{self.world}/annotations/{kind}_{split}.json"

    def images(self, split: str) -> str:
        """The image folder of a split."""
        return f"{self.world}/images/{split}"


def make_budget(root: Path, scale: float) -> Budget:
    """The demo's images and iterations at `scale`."""
    if not 0 < scale < float("inf"):
        raise InputError(f"--scale {scale}: expected a positive number; 1 is the default budget.")
    few = min(scale, 1.0)
    return Budget(
        scale=scale,
        caption_images=max(FEWEST_IMAGES, round(scale * CAPTION_IMAGES)),
        labelled_images=max(FEWEST_IMAGES, round(few * LABELLED_IMAGES)),
        test_images=max(FEWEST_IMAGES, round(few * TEST_IMAGES)),
        pretrain=_schedule(root / PRETRAIN_CONFIG, scale),
        detect=_schedule(root / DETECT_CONFIG, scale),
    )


def make_plan(root: Path, output: Path, budget: Budget, num_seeds: int) -> Plan:
    """The stages: three splits of the world, then for each seed one pretraining and two detectors.

    Seeds are 1 to `num_seeds`, so that a longer demo contains a shorter one. A seed sets the
    initialisation, the order of the images and their augmentation, in pretraining and in both
    detectors; the images of the world are the same for all.
    """
    if num_seeds < 1:
        raise InputError(f"--seeds {num_seeds}: expected at least 1.")
    base = str(output.relative_to(root)) if output.is_relative_to(root) else str(output)
    plan = Plan(budget, tuple(range(1, num_seeds + 1)), f"{base}/world", f"{base}/runs")
    world = tuple(
        _world_stage(plan, split, count)
        for split, count in (
            ("captions", budget.caption_images),
            ("train", budget.labelled_images),
            ("test", budget.test_images),
        )
    )
    stages = list(world)
    for seed in plan.seeds:
        pretrain = _pretrain_stage(plan, seed, (world[0], world[2]))
        stages.append(pretrain)
        stages += [_detect_stage(plan, seed, start, world[1:], pretrain) for start in STARTS]
    return replace(plan, stages=tuple(stages))


def _world_stage(plan: Plan, split: str, count: int) -> Stage:
    what = {
        "captions": "captioned images for pretraining",
        "train": "labelled images for the detectors",
        "test": "held-out images",
    }
    return Stage(
        name=f"world-{split}",
        title=f"Shapes: {count} {what[split]}",
        command=(
            "tools/make_shapes.py",
            *("--output", plan.world, "--split", split),
            *("--num-images", str(count), "--size", str(IMAGE_SIZE)),
            *("--seed", str(SPLIT_SEEDS[split]), "--max-objects", str(MAX_OBJECTS)),
        ),
        folder=plan.world,
        again="--overwrite",
    )


def _pretrain_stage(plan: Plan, seed: int, needs: tuple[Stage, ...]) -> Stage:
    folder, schedule = plan.run_folder(seed, "pretrain"), plan.budget.pretrain
    return Stage(
        name=f"seed{seed}-pretrain",
        title=f"Seed {seed}: caption pretraining of a ResNet-50, {schedule.iterations} iterations",
        command=(
            *("tools/pretrain_net.py", "--config-file", PRETRAIN_CONFIG),
            *("OUTPUT_DIR", folder, "SEED", str(seed)),
            *("DATA.TRAIN_CAPTIONS", plan.annotations("captions", "captions")),
            *("DATA.TRAIN_IMAGES", plan.images("captions")),
            *("DATA.VAL_CAPTIONS", plan.annotations("captions", "test")),
            *("DATA.VAL_IMAGES", plan.images("test")),
            *schedule.overrides,
        ),
        folder=folder,
        configs=(PRETRAIN_CONFIG,),
        needs=needs,
        iterations=schedule.iterations,
    )


def _detect_stage(
    plan: Plan, seed: int, start: str, world: tuple[Stage, ...], pretrain: Stage
) -> Stage:
    folder, schedule = plan.run_folder(seed, start), plan.budget.detect
    from_captions = start == "pretrained"
    data_sets = [
        [f"shapes_{split}", "coco", plan.annotations("instances", split), plan.images(split)]
        for split in ("train", "test")
    ]
    return Stage(
        name=f"seed{seed}-{start}",
        title=f"Seed {seed}: Mask R-CNN from {_SOURCES[start]}, {schedule.iterations} iterations",
        command=(
            *("tools/train_net.py", "--config-file", DETECT_CONFIG),
            *("OUTPUT_DIR", folder, "SEED", str(seed)),
            *("MODEL.WEIGHTS", f"{pretrain.folder}/backbone.safetensors" if from_captions else ""),
            *("VIRTEX.DATASETS", repr(data_sets)),
            *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"),
            *schedule.overrides,
        ),
        folder=folder,
        configs=(DETECT_CONFIG,),
        needs=(*world, pretrain) if from_captions else world,
        iterations=schedule.iterations,
        label=start,
        group=f"seed{seed}-detectors",  # two processes of half the threads are faster than one
    )


# Keys that are counted in iterations, with the least that each can be.
_COUNTED = {"SOLVER.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.EVAL_PERIOD": 2}
# Likewise, but a longer run does not need more of them.
_COUNTED_BELOW_1 = {"TEST.PRECISE_BN.NUM_ITER": 1}


def _schedule(path: Path, scale: float) -> Schedule:
    config = read_config(path)
    iterations = max(4, round(scale * _required(config, "SOLVER.MAX_ITER", path)))
    overrides = []
    if scale != 1:
        overrides += ["SOLVER.MAX_ITER", str(iterations)]
        for key, least in {**_COUNTED, **_COUNTED_BELOW_1}.items():
            value = _get(config, key)
            factor = min(scale, 1.0) if key in _COUNTED_BELOW_1 else scale
            if value is not None:
                overrides += [key, str(max(least, round(factor * value)))]
        steps = _get(config, "SOLVER.STEPS")
        if steps is not None:
            steps = ast.literal_eval(steps) if isinstance(steps, str) else steps
            # Each below the length and none twice, or detectron2 refuses them.
            scaled = {min(iterations - 1, max(1, round(scale * step))) for step in steps}
            overrides += ["SOLVER.STEPS", repr(tuple(sorted(scaled)))]
    return Schedule(iterations, _required(config, "SOLVER.IMS_PER_BATCH", path), tuple(overrides))


def _get(config: dict[str, Any], dotted: str) -> Any:
    for name in dotted.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _required(config: dict[str, Any], dotted: str, path: Path) -> int:
    value = _get(config, dotted)
    if not isinstance(value, int):
        raise InputError(f"{path}: the demo needs {dotted} as a number here; found {value!r}.")
    return value
