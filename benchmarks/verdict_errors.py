"""How often is the verdict of tools/compare_inits.py wrong? On planted starts, and by simulation.

python benchmarks/verdict_errors.py --output output/verdict_errors     # trains, stores, reports
python benchmarks/verdict_errors.py                                    # reports on what is stored

Three starts of small Faster R-CNNs on the synthetic world, of which is known what they are:

good      a ResNet-18 pretrained on the labels of the detectors' images, among others
harmful   the same file, the numbers of each tensor scrambled within it
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
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from virtex_d2.engine.errors import InputError, exit_on_input_error  # noqa: E402
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
PRETRAIN, DETECT = "configs/pretrain/shapes_R_50.yaml", "configs/shapes/mask_rcnn_R_50_FPN.yaml"
IMAGES = {"train": (1500, 2), "test": (150, 3)}  # of each split, and its seed
FRACTION = 0.2  # of the labelled images are a detector's
PRETRAINING = {
    "MODEL.OBJECTIVE": "multilabel_classification",
    "MODEL.VISUAL.NAME": "resnet18",
    "SOLVER.MAX_ITER": 300,
    "SOLVER.WARMUP_ITERS": 30,
    "SOLVER.CHECKPOINT_PERIOD": 300,
}
DETECTOR = {
    "MODEL.MASK_ON": False,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 256,
    "SOLVER.MAX_ITER": 160,
    "SOLVER.STEPS": "(130,)",
    "SOLVER.WARMUP_ITERS": 15,
    "TEST.EVAL_PERIOD": 40,
    "TEST.PRECISE_BN.NUM_ITER": 10,
    "DATALOADER.NUM_WORKERS": 0,
}
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
    if not STORED.is_file():
        raise InputError(f"{STORED}: nothing is stored yet; train with --output.")
    report(read_values(STORED), args.draws)


def train(output: Path, seeds: Sequence[int], jobs: int) -> None:
    """Make the planted starts, train a detector from each with each seed, and store the figures."""
    claim_output(output, "verdict_errors", {"detector": DETECTOR, "pretraining": PRETRAINING})
    good, harmful = output / "pretrain" / "backbone.safetensors", output / "harmful.safetensors"
    world = [_world(output, split) for split in IMAGES]
    run_stages([*world, _pretraining(output)], ROOT, output, [{}])
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
    tensors: Mapping[str, "np.ndarray"], metadata: Mapping[str, str]
) -> tuple[dict, Mapping[str, str]]:
    """Shuffle the numbers of every tensor within it; running statistics keep their places."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in sorted(tensors.items()):
        made[name] = tensor
        if not name.rpartition(".")[2].startswith("running_"):
            order = torch.randperm(tensor.numel(), generator=generator)
            made[name] = tensor.flatten()[order].reshape(tensor.shape)
    return made, metadata


def _world(output: Path, split: str) -> Stage:
    count, seed = IMAGES[split]
    return Stage(
        name=f"world-{split}",
        title=f"Shapes: {count} images",
        command=(
            *("tools/make_shapes.py", "--output", str(output / "world"), "--split", split),
            *("--num-images", str(count), "--size", "96", "--seed", str(seed)),
            *("--max-objects", "3"),
        ),
        folder=str(output / "world"),
        again="--overwrite",
    )


def _files(output: Path, kind: str, split: str) -> tuple[str, str]:
    world = output / "world"
    return str(world / "annotations" / f"{kind}_{split}.json"), str(world / "images" / split)


def _pretraining(output: Path) -> Stage:
    captions, images = _files(output, "captions", "train")
    options = {
        "OUTPUT_DIR": output / "pretrain",
        "DATA.TRAIN_CAPTIONS": captions,
        "DATA.TRAIN_IMAGES": images,
        "DATA.TRAIN_LABELS": _files(output, "instances", "train")[0],
        **PRETRAINING,
    }
    return Stage(
        name="pretrain",
        title="Pretraining on the labels of the detectors' images",
        command=("tools/pretrain_net.py", "--config-file", PRETRAIN, *_words(options)),
        folder=str(output / "pretrain"),
        configs=(PRETRAIN,),
    )


def _plan(output: Path, starts: tuple[Init, ...], seeds: Sequence[int]) -> Plan:
    sets = [[f"shapes_{split}", "coco", *_files(output, "instances", split)] for split in IMAGES]
    options = {
        "VIRTEX.DATASETS": repr(sets),
        "DATASETS.TRAIN": "('shapes_train',)",
        "DATASETS.TEST": "('shapes_test',)",
        **DETECTOR,
    }
    name = Path(DETECT).stem
    return Plan({name: DETECT}, starts, {name: (FRACTION,)}, tuple(seeds), _words(options))


def _words(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(word) for pair in options.items() for word in pair)


def _store(start: str, seed: int, curve: Mapping[int, float]) -> None:
    """Keep a run's AP by iteration, beside those that are there."""
    stored = read_json(STORED) if STORED.is_file() else {"runs": {}}
    stored |= {"pretraining": PRETRAINING, "detector": DETECTOR, "fraction": FRACTION}
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


def report(values: Values, draws: int) -> None:
    """Print what is stored, and how often verdicts on it, and on simulated runs, are wrong."""
    rows = []
    for start in (BASELINE, *PLANTED):
        own, diff = sample(values[start]), difference(values[start], values[BASELINE])
        between = (f"{diff.mean:+.2f}", f"{diff.deviation:.2f}") if diff.values else ("", "")
        rows.append((start, len(own.values), f"{own.mean:.2f}", f"{own.deviation:.2f}", *between))
    head = ("start", "runs", "area under box AP", "deviation", "difference", "its deviation")
    print(f"Stored runs\n{tabulate(rows, head)}")
    rng = np.random.default_rng(0)
    most = min(len(shared_seeds(values)), (len(values[BASELINE]) + len(values[NULL])) // 2)
    for count in (3, 5):
        if count < most:
            repeats = [resample(values, count, rng) for _ in range(REPEATS)]
            _confusion(f"{REPEATS} repeats of {count} stored seeds, which they share", repeats)
        simulated = [simulate(values, count, rng) for _ in range(draws)]
        _confusion(f"{draws} draws of {count} normal seeds like the stored ones", simulated)
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
