"""Which pretraining task transfers best, at equal images? On the synthetic world, with seeds.

python benchmarks/compare_tasks.py --output output/tasks

Pretrains a ResNet-50 by bicaptioning, token classification and multi-label classification on the
same images for the same iterations, once with each seed, and gives them with random weights to
tools/compare_inits.py: Mask R-CNN on all labelled images and on a tenth. It is the small
counterpart of the paper's table of tasks (arXiv 2006.06666, section 4). What is done is not
repeated. Some four hours on one core; `--jobs 2` uses two.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from virtex_d2.engine.errors import exit_on_input_error  # noqa: E402
from virtex_d2.studies.demo.line import (  # noqa: E402
    DETECT_CONFIG,
    IMAGES,
    PRETRAIN_CONFIG,
    world_stage,
)
from virtex_d2.studies.stages import Stage, claim_output, exit_on_stop, run_stages  # noqa: E402

TASKS = ("bicaptioning", "token_classification", "multilabel_classification")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--pretrain-only", action="store_true", help="stop before the detectors")
    args = parser.parse_args()
    output = args.output.resolve()

    claim_output(output, "tasks", {"images": IMAGES["captions"]})
    world = [world_stage(str(output / "world"), *split) for split in IMAGES.items()]
    pretraining = [_pretraining(output, task, seed) for seed in args.seeds for task in TASKS]
    run_stages([*world, *pretraining], ROOT, output, [{}] * args.jobs)
    if args.pretrain_only:
        return
    data_sets = [
        [f"shapes_{split}", "coco", *_instances(output, split)] for split in ("train", "test")
    ]
    command = [
        *(sys.executable, ROOT / "tools" / "compare_inits.py"),
        *("--output", output / "comparison", "--config-file", DETECT_CONFIG),
        *("--jobs", args.jobs, "--seeds", *args.seeds, "--fractions", *args.fractions),
        *("--init", "random"),
        *(
            word
            for task in TASKS
            for word in ("--init", f"{task}={_folder(output, task, '{seed}')}/backbone.safetensors")
        ),
        *("--opts", "VIRTEX.DATASETS", repr(data_sets)),
        *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"),
    ]
    sys.exit(subprocess.run(list(map(str, command)), check=False, cwd=ROOT).returncode)


def _pretraining(output: Path, task: str, seed: int) -> Stage:
    options = {"OUTPUT_DIR": _folder(output, task, seed), "SEED": seed, "MODEL.OBJECTIVE": task}
    for key, split in (("TRAIN", "captions"), ("VAL", "test")):
        labels, images = _instances(output, split)
        annotations = output / "world" / "annotations" / f"captions_{split}.json"
        options |= {f"DATA.{key}_CAPTIONS": annotations, f"DATA.{key}_IMAGES": images}
        if task == "multilabel_classification":
            options[f"DATA.{key}_LABELS"] = labels
    return Stage(
        name=f"{task}-seed{seed}",
        title=f"Pretraining by {task}, seed {seed}",
        command=(
            *("tools/pretrain_net.py", "--config-file", PRETRAIN_CONFIG),
            *(str(part) for pair in options.items() for part in pair),
        ),
        folder=str(_folder(output, task, seed)),
        configs=(PRETRAIN_CONFIG,),
        label=f"{task}-seed{seed}",
        group="pretraining",
    )


def _folder(output: Path, task: str, seed: int | str) -> Path:
    return output / "pretrain" / task / f"seed{seed}"


def _instances(output: Path, split: str) -> tuple[str, str]:
    world = output / "world"
    return str(world / "annotations" / f"instances_{split}.json"), str(world / "images" / split)


if __name__ == "__main__":
    with exit_on_input_error(), exit_on_stop():
        main()
