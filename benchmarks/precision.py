#!/usr/bin/env python
"""What lower precision changes in training: losses beside float32's, on the same samples.

python benchmarks/precision.py --output output/precision --seeds 1 2 --jobs 2 --opts \\
    DATA.TRAIN_CAPTIONS captions_train.json DATA.TRAIN_IMAGES train \\
    DATA.VAL_CAPTIONS captions_val.json DATA.VAL_IMAGES val

Each precision pretrains with each seed by tools/pretrain_net.py: with the same seed weights start
the same, and so do samples and crops. Printed are training losses (medians of LOG_PERIOD
iterations) along the way, the last validation's, and differences to float32 of the same seed beside
those that another seed makes. The same command goes on where it stopped; runs of other settings
are refused.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.rounds import count  # noqa: E402
from pretrain.config import get_pretrain_cfg  # noqa: E402
from virtex_d2.engine.config import load_config  # noqa: E402
from virtex_d2.engine.errors import InputError, exit_on_input_error  # noqa: E402
from virtex_d2.studies.stages import Stage, claim_output, exit_on_stop, run_stages  # noqa: E402

CONFIG = ROOT / "configs" / "pretrain" / "small_R_50.yaml"
PRECISIONS = {
    "float32": ["SOLVER.AMP.ENABLED", "False"],
    "bfloat16": ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"],
}
REFERENCE = "float32"
Curve = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--config-file", type=Path, default=CONFIG, help=f"default: {CONFIG.name}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--iterations", type=count, default=500)
    parser.add_argument("--points", type=count, default=5, help="of the curve (default 5)")
    parser.add_argument("--jobs", type=count, default=1, help="runs at the same time (default 1)")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="of tools/pretrain_net.py; after everything else",
    )
    args = parser.parse_args()
    if args.iterations % args.points:
        parser.error(f"--points {args.points}: expected a divisor of --iterations")

    output = args.output.resolve()
    cfg = load_config(get_pretrain_cfg(), str(args.config_file), args.opts)
    if not cfg.DATA.VAL_CAPTIONS:
        raise InputError("DATA.VAL_CAPTIONS: expected captions to validate with, found none.")

    claim_output(output, "precision", {"iterations": args.iterations, "points": args.points})
    runs = [(precision, seed) for seed in sorted(set(args.seeds)) for precision in PRECISIONS]
    stages = {run: _pretraining(args, output, *run) for run in runs}
    run_stages(list(stages.values()), ROOT, output, [{}] * args.jobs)
    curves = {run: _curve(Path(stage.folder)) for run, stage in stages.items()}
    print("\n" + table(curves, args.iterations, args.points))


def _pretraining(args: argparse.Namespace, output: Path, precision: str, seed: int) -> Stage:
    name, config = f"{precision}-seed{seed}", str(args.config_file.resolve())
    options = ["SEED", seed, "OUTPUT_DIR", output / name]
    options += ["SOLVER.MAX_ITER", args.iterations, "SOLVER.WARMUP_ITERS", args.iterations // 10]
    options += ["LOG_PERIOD", args.iterations // args.points]
    options += ["TEST.EVAL_PERIOD", args.iterations, *PRECISIONS[precision], *args.opts]
    return Stage(
        name=name,
        title=f"Pretraining in {precision}, seed {seed}",
        command=("tools/pretrain_net.py", "--config-file", config, *map(str, options)),
        folder=str(output / name),
        configs=(config,),
        label=name,
        group="pretraining",
    )


def _curve(run: Path) -> tuple[Curve, float]:
    """The training loss by iterations done, and the last validation loss."""
    rows = list(map(json.loads, (run / "metrics.json").read_text().splitlines()))
    losses = {row["iteration"] + 1: row["total_loss"] for row in rows if "total_loss" in row}
    validation = [row["val/loss"] for row in rows if "val/loss" in row]
    return losses, validation[-1]


def table(curves: dict[tuple[str, int], tuple[Curve, float]], iterations: int, points: int) -> str:
    """Markdown: a row for each run, and differences as means of their absolute values."""
    at = range(iterations // points, iterations + 1, iterations // points)
    places = [*map(str, at), "validation"]
    values = {
        run: [*(losses[place] for place in at), validation]
        for run, (losses, validation) in curves.items()
    }
    seeds = sorted({seed for _, seed in curves})
    rows = [(f"{name}, seed {seed}", row) for (name, seed), row in values.items()]
    for name in PRECISIONS:
        if name != REFERENCE:
            pairs = [(values[name, seed], values[REFERENCE, seed]) for seed in seeds]
            rows.append((f"{name} from {REFERENCE}, the same seed", _mean_difference(pairs)))
    others = [(values[REFERENCE, a], values[REFERENCE, b]) for a, b in itertools.pairwise(seeds)]
    if others:
        rows.append((f"{REFERENCE}, from seed to seed", _mean_difference(others)))
    lines = [f"| loss after iteration | {' | '.join(places)} |", "|---" * (len(places) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{v:.3f}' for v in row)} |" for name, row in rows]
    return "\n".join(lines)


def _mean_difference(pairs: list[tuple[list[float], list[float]]]) -> list[float]:
    differences = [[abs(a - b) for a, b in zip(*pair)] for pair in pairs]
    return [statistics.mean(column) for column in zip(*differences)]


if __name__ == "__main__":
    with exit_on_input_error(), exit_on_stop():
        main()
