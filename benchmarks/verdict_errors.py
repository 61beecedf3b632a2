"""How often is the verdict of tools/compare_inits.py wrong? On planted starts, and by simulation.

python benchmarks/verdict_errors.py --output output/verdict_errors     # trains, stores, reports
python benchmarks/verdict_errors.py                                    # reports on what is stored

Three starts of small Faster R-CNNs on the synthetic world, of which is known what they are:

good      a backbone that was trained on the labels of the detectors' images and of four times as
          many others
harmful   the same file, the numbers of each tensor scrambled within it, and the scales of the
          residual blocks' last norms at 0, near which too short a pretraining leaves them
          (docs/transfer.md)
null      random weights under another name

Each detector is trained once for every seed, `null` with seeds of its own: with those of `random`
it would be the same run, bit for bit. Their figures are kept in
benchmarks/results/verdict_errors.json; what is done is not repeated.

Repeats. Of the stored seeds a repeat draws some without replacement (one drawn twice would make the
spread look smaller than it is), for `null` from all random runs that the repeat does not use
already, and judges the three starts together. Repeats share runs: 200 of them are fewer than 200
independent ones, and their rates a description of these runs. So two simulations stand beside
them, with as many independent draws as wanted: one of normal runs with the stored means and
spreads, and one of starts that are all the baseline under other names, with normal, heavy-tailed
and skewed runs.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from virtex_d2.engine.errors import exit_on_input_error  # noqa: E402
from virtex_d2.engine.files import (  # noqa: E402
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from virtex_d2.studies.compare.plan import Init, Plan  # noqa: E402
from virtex_d2.studies.compare.runs import Metric, read_run  # noqa: E402
from virtex_d2.studies.curves import area  # noqa: E402
from virtex_d2.studies.stages import Stage, claim_output, exit_on_stop, run_stages  # noqa: E402
from virtex_d2.studies.verdict import (  # noqa: E402
    FALSE_CLAIMS,
    HELPS,
    HURTS,
    UNDECIDED,
    difference,
    judge,
    sample,
)

STORED = ROOT / "benchmarks" / "results" / "verdict_errors.json"
CONFIG = "configs/shapes/mask_rcnn_R_50_FPN.yaml"
SIDE = 64  # pixels of the images
IMAGES = {"train": (1500, 2), "test": (150, 3)}  # of each split, and its seed
FRACTION = 0.2  # of the labelled images are a detector's
DETECTOR = {
    "MODEL.MASK_ON": False,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 256,
    "INPUT.MIN_SIZE_TRAIN": (SIDE,),
    "INPUT.MIN_SIZE_TEST": SIDE,
    "SOLVER.MAX_ITER": 150,
    "SOLVER.STEPS": (120,),
    "SOLVER.WARMUP_ITERS": 15,
    "TEST.EVAL_PERIOD": 50,
    "TEST.PRECISE_BN.NUM_ITER": 10,
    "DATALOADER.NUM_WORKERS": 0,
}
LONGER = {"SOLVER.MAX_ITER": 450, "SOLVER.STEPS": (380,), "TEST.EVAL_PERIOD": 450}
BASELINE, NULL = "random", "null"
PLANTED = {"good": HELPS, "harmful": HURTS, NULL: UNDECIDED}  # and what they deserve
OTHER_SEEDS = 100  # what the seeds of `null` begin behind
MEASURE = Metric("", "bbox", "", "AP")
REPEATS = 200
Values = Mapping[str, Mapping[int, float]]  # of each start by seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the trainings; none: only report")
    parser.add_argument("--seeds", type=int, default=6, help="of every start (default 6)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--draws", type=int, default=2000, help="of each simulation")
    args = parser.parse_args()
    if args.output:
        train(args.output.resolve(), range(1, args.seeds + 1), args.jobs)
    values = read_values(STORED) if STORED.is_file() else {}
    rng = np.random.default_rng(0)
    if len(values) == 1 + len(PLANTED) and len(shared_seeds(values)) > 2:
        report_planted(values, args.draws, rng)
    else:
        print(f"{STORED}: fewer than three seeds of every planted start; train with --output.")
    report_null(args.draws, rng)


def train(output: Path, seeds: Sequence[int], jobs: int) -> None:
    """Make the planted starts, train a detector from each with each seed, and store the figures."""
    claim_output(output, "verdict_errors", {"side": SIDE})
    good, harmful = output / "good.safetensors", output / "harmful.safetensors"
    run_stages([*(_world(output, split) for split in IMAGES), *_planting(output)], ROOT, output)
    if not harmful.is_file():
        write_safetensors(harmful, *scrambled(*read_safetensors(good)))
    starts = (Init(BASELINE), Init("good", str(good)), Init("harmful", str(harmful)))
    for seed in seeds:  # a seed's runs together: what is there when it stops can be judged
        for plan in (
            _plan(output, starts, [seed]),
            _plan(output, (Init(NULL),), [OTHER_SEEDS + seed]),
        ):
            stages = plan.stages(ROOT, output)
            run_stages(stages, ROOT, output, [{}] * jobs)
            for cell, stage in zip(plan.cells, stages):
                _store(cell.init, cell.seed, read_run(cell, ROOT / stage.folder).curves[MEASURE])


def scrambled(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[dict, Mapping[str, str]]:
    """Make the harmful start of a ResNet-18 in torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in sorted(tensors.items()):
        order = torch.randperm(tensor.numel(), generator=generator)
        made[name] = tensor.flatten()[order].reshape(tensor.shape)
        if name.startswith("layer") and name.endswith(".bn2.weight"):
            made[name] = torch.zeros_like(tensor)
    return made, metadata


def _world(output: Path, split: str) -> Stage:
    count, seed = IMAGES[split]
    return Stage(
        name=f"world-{split}",
        title=f"Shapes: {count} images",
        command=(
            *("tools/make_shapes.py", "--output", str(output / "world"), "--split", split),
            *("--num-images", str(count), "--size", str(SIDE), "--seed", str(seed)),
            *("--max-objects", "3"),
        ),
        folder=str(output / "world"),
        again="--overwrite",
    )


def _files(output: Path, kind: str, split: str) -> tuple[str, str]:
    world = output / "world"
    return str(world / "annotations" / f"{kind}_{split}.json"), str(world / "images" / split)


def _planting(output: Path) -> list[Stage]:
    """The detector that the good start comes from, and its backbone as a file."""
    folder, good = output / "planted", output / "good.safetensors"
    options = {"OUTPUT_DIR": folder, "SEED": 0, **_data(output), **DETECTOR, **LONGER}
    training = Stage(
        name="planted",
        title="A detector on all labelled images",
        command=("tools/train_net.py", "--config-file", CONFIG, *_words(options)),
        folder=str(folder),
        configs=(CONFIG,),
    )
    export = Stage(
        name="good",
        title="Its backbone",
        command=("tools/convert_checkpoint.py", str(folder / "model_final.pth"), str(good)),
        folder=str(output),
        needs=(training,),
        again="--overwrite",
    )
    return [training, export]


def _data(output: Path) -> dict[str, str]:
    sets = [[f"shapes_{split}", "coco", *_files(output, split)] for split in IMAGES]
    names = {"DATASETS.TRAIN": "('shapes_train',)", "DATASETS.TEST": "('shapes_test',)"}
    return {"VIRTEX.DATASETS": repr(sets), **names}


def _files(output: Path, split: str) -> tuple[str, str]:
    world = output / "world"
    return str(world / "annotations" / f"instances_{split}.json"), str(world / "images" / split)


def _plan(output: Path, starts: tuple[Init, ...], seeds: Sequence[int]) -> Plan:
    name, words = Path(CONFIG).stem, _words({**_data(output), **DETECTOR})
    return Plan({name: CONFIG}, starts, {name: (FRACTION,)}, tuple(seeds), words)


def _words(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(word) for pair in options.items() for word in pair)


def _store(start: str, seed: int, curve: Mapping[int, float]) -> None:
    """Keep a run's AP by iteration, beside those that are there."""
    stored = read_json(STORED) if STORED.is_file() else {"runs": {}}
    stored |= {"detector": DETECTOR, "planted": LONGER, "fraction": FRACTION, "side": SIDE}
    runs = stored["runs"].setdefault(start, {})
    runs[str(seed)] = {str(iteration): round(value, 3) for iteration, value in curve.items()}
    write_json(STORED, stored)


def read_values(path: Path) -> Values:
    """Read what decides a verdict, the area under the AP curve, of every stored run."""
    return {
        start: {
            int(seed): area({int(iteration): value for iteration, value in curve.items()})
            for seed, curve in runs.items()
        }
        for start, runs in read_json(path)["runs"].items()
    }


def report_planted(values: Values, draws: int, rng: np.random.Generator) -> None:
    """Print what is stored, and how often verdicts on it, and on runs like it, are wrong."""
    rows = []
    for start in (BASELINE, *PLANTED):
        own, diff = sample(values[start]), difference(values[start], values[BASELINE])
        between = (f"{diff.mean:+.2f}", f"{diff.deviation:.2f}") if diff.values else ("", "")
        rows.append((start, len(own.values), f"{own.mean:.2f}", f"{own.deviation:.2f}", *between))
    head = ("start", "runs", "area under box AP", "deviation", "difference", "its deviation")
    print(f"Stored runs\n{tabulate(rows, head)}")
    most = min(len(shared_seeds(values)), (len(values[BASELINE]) + len(values[NULL])) // 2)
    for count in (3, 5):
        if count < most:
            repeats = [resample(values, count, rng) for _ in range(REPEATS)]
            _confusion(f"{REPEATS} repeats of {count} stored seeds, which they share", repeats)
        simulated = [simulate(values, count, rng) for _ in range(draws)]
        _confusion(f"{draws} draws of {count} normal seeds like the stored ones", simulated)


def report_null(draws: int, rng: np.random.Generator) -> None:
    """Print how often families without any true difference get a claim."""
    rows = [
        (
            name,
            family,
            *(f"{100 * null_rate(draw, family, count, draws, rng):.1f}" for count in (3, 5, 8)),
        )
        for name, draw in DISTRIBUTIONS.items()
        for family in (1, 3, 7)
    ]
    head = ("runs are", "starts", "3 seeds", "5 seeds", "8 seeds")
    print(
        f"\nAll starts are the baseline under other names: families with a false claim, percent\n"
        f"of {draws} draws, at most {100 * FALSE_CLAIMS:g} expected\n{tabulate(rows, head)}"
    )


def shared_seeds(values: Values) -> list[int]:
    """Seeds that the baseline and the two planted starts have run with."""
    starts = (BASELINE, *(start for start in PLANTED if start != NULL))
    return sorted(set.intersection(*(set(values[start]) for start in starts)))


def resample(values: Values, count: int, rng: np.random.Generator) -> dict[str, str]:
    """Draw `count` stored seeds without replacement, and judge the planted starts on them."""
    seeds = rng.choice(shared_seeds(values), count, replace=False).tolist()
    baseline = {seed: values[BASELINE][seed] for seed in seeds}
    drawn = {start: difference(values[start], baseline) for start in PLANTED if start != NULL}
    others = [value for seed, value in values[BASELINE].items() if seed not in baseline]
    others += values[NULL].values()
    drawn[NULL] = difference(dict(zip(seeds, rng.choice(others, count, replace=False))), baseline)
    return _words_of(drawn)


def simulate(values: Values, count: int, rng: np.random.Generator) -> dict[str, str]:
    """Draw normal runs whose means and covariance are those of the stored ones, and judge them."""
    starts = [BASELINE, *(start for start in PLANTED if start != NULL)]
    stored = np.array([[values[start][seed] for start in starts] for seed in shared_seeds(values)])
    spread = np.cov(stored, rowvar=False)
    runs = rng.multivariate_normal(stored.mean(axis=0), spread, count)
    drawn = {
        start: sample(dict(enumerate(runs[:, place] - runs[:, 0])))
        for place, start in enumerate(starts)
        if place
    }
    null = rng.normal(stored.mean(axis=0)[0], spread[0, 0] ** 0.5, count)
    drawn[NULL] = sample(dict(enumerate(null - runs[:, 0])))
    return _words_of(drawn)


def _words_of(differences: Mapping) -> dict[str, str]:
    return {start: verdict.word for start, verdict in judge(differences).items()}


def _confusion(title: str, repeats: Sequence[Mapping[str, str]]) -> None:
    counts = Counter((start, word) for words in repeats for start, word in words.items())
    words = (HELPS, HURTS, UNDECIDED)
    rows = [(start, *(counts[start, word] for word in words)) for start in PLANTED]
    false = sum(
        any(words[start] not in (deserved, UNDECIDED) for start, deserved in PLANTED.items())
        for words in repeats
    )
    print(f"\n{title}\n{tabulate(rows, ('planted', *words))}")
    print(f"families with a false claim: {false} of {len(repeats)}")


Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# Runs around their mean of 0, the baseline's in the first row.
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "Student's t, 2 degrees": lambda rng, size: rng.standard_t(2, size),
    "exponential": lambda rng, size: rng.standard_exponential(size) - 1,
    "one in ten fails": lambda rng, size: rng.standard_normal(size) - 10 * (rng.random(size) < 0.1),
    # not the same start: of the same mean alone, and the differences are skewed
    "exponential against a constant": lambda rng, size: (
        (rng.standard_exponential(size) - 1) * (np.arange(size[0]) > 0)[:, None]
    ),
}


def null_rate(draw: Draw, family: int, count: int, draws: int, rng: np.random.Generator) -> float:
    """Find the share of families, all of the baseline under other names, with any claim."""
    false = 0
    for _ in range(draws):
        runs = draw(rng, (family + 1, count))
        words = judge(
            {str(k): sample(dict(enumerate(runs[k] - runs[0]))) for k in range(1, family + 1)}
        )
        false += any(verdict.word != UNDECIDED for verdict in words.values())
    return false / draws


if __name__ == "__main__":
    with exit_on_input_error(), exit_on_stop():
        main()
