#!/usr/bin/env python
"""Check a GPU machine before it is trusted: ten steps, without data and without a network.

python tools/check_gpu.py --minutes 8 --output output/gpu_check
python tools/check_gpu.py --only timing ceilings

Each step runs in a process of its own and prints a line with PASS or FAIL and its figure.
check_gpu.json in the output folder is written after every step, summary.md at the end; what went
wrong is in log.txt. On a CPU the same steps run tiny. The exit code is 1 where a step has failed,
or was not run for lack of time. docs/gpu.md says how to read it. Steps, in their order:

"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.plan import LAST, STEPS
from virtex_d2.engine.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    steps = "\n".join(f"  {name:12} {step.what}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + steps, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all steps (default 8)")
    parser.add_argument("--output", type=Path, default=Path("output/gpu_check"), metavar="DIR")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, metavar="STEP", help="some of the steps"
    )
    parser.add_argument("--captions", metavar="FOLDER", help=f"{LAST}: captions_train.json, "
                        "captions_val.json and images/")  # fmt: skip
    parser.add_argument("--voc", metavar="FOLDER", help=f"{LAST}: the folder of VOC2007")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--num-processes", type=int, help="first check these, of this machine")
    parser.add_argument("--keep", action="store_true", help="leave the steps' files in DIR/work")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code."""
    args = parse_args()
    # after parsing: --help need not wait for it
    from benchmarks.gpu.runner import run_steps

    names = _chosen(args)
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    before = {}
    if _several(args):
        before = _check_processes(args)
        if os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")) != "0":
            return 0  # the steps are the first process's
    # so that the running step's processes are ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    (args.output / "log.txt").unlink(missing_ok=True)
    folders = {key: str(Path(given).resolve()) if (given := getattr(args, key)) else ""
               for key in ("captions", "voc")}  # fmt: skip
    options = {"device": args.device, **folders}
    found = run_steps(names, 60 * args.minutes, args.output, options, before)
    if not args.keep:
        shutil.rmtree(args.output / "work", ignore_errors=True)
    print(f"{'PASS' if found['passed'] else 'FAIL'}: {args.output / 'summary.md'}")
    return 0 if found["passed"] else 1


def _chosen(args: argparse.Namespace) -> list[str]:
    given = bool(args.captions), bool(args.voc)
    if (args.only and LAST in args.only and not all(given)) or any(given) != all(given):
        raise InputError(f"{LAST}: expected both --captions and --voc, found one or none of them.")
    if not 0 < args.minutes < 10_000:
        raise InputError(f"--minutes {args.minutes}: expected a number above 0.")
    for key, inside in (("captions", "captions_train.json"), ("voc", "ImageSets")):
        folder = getattr(args, key)
        if folder and not (Path(folder) / inside).exists():
            raise InputError(f"--{key} {folder}: expected {inside} in it, found none.")
    return [
        name for name in STEPS if (name in args.only if args.only else name != LAST or all(given))
    ]


def _several(args: argparse.Namespace) -> bool:
    """Whether there are further processes: of srun, of torchrun, or asked for."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("WORLD_SIZE", "1"))
    return int(tasks) > 1 or (args.num_processes or 1) > 1


def _check_processes(args: argparse.Namespace) -> dict:
    """By name, what the processes have found together; ends where they are to be requeued."""
    from benchmarks.gpu import nodes
    from virtex_d2.engine.cli import argument_parser
    from virtex_d2.engine.distributed import launch

    words = ["--num-processes", str(args.num_processes)] if args.num_processes else []
    words += ["MODEL.DEVICE", "cpu"] if args.device == "cpu" else []
    flags = argument_parser().parse_args(words)
    flags.output = args.output
    launch(nodes.main, flags)
    return nodes.results(args.output)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
