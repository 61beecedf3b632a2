#!/usr/bin/env python
"""Measure this project beside the plain way of doing the same, both in one run.

python tools/benchmark.py pretrain                    the training step: images/s, FLOP/s, memory
python tools/benchmark.py loader --images coco/val2017 --captions captions_val2017.json
                                                      decoding and augmenting: images/s of a core
python tools/benchmark.py finetune --size 800 1056    the detector's step beside stock detectron2's
python tools/benchmark.py caption --images 8 16       beam search beside recomputing every prefix
python tools/benchmark.py checkpoint --folder output  how long a checkpoint keeps training waiting
python tools/benchmark.py restore                     IPT's two rules of tiles: seconds, memory
python tools/benchmark.py growth                      time and memory against sizes
python tools/benchmark.py startup                     --help, and the time to the first iteration

Where ways are compared, they are first asserted to compute the same. NAME --help says what is
measured and how. docs/performance.md has figures.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What is measured -> the module with add_arguments, measure and report, and perhaps profile.
BENCHMARKS = {
    "pretrain": "benchmarks.pretrain_step",
    "loader": "benchmarks.loader",
    "finetune": "benchmarks.finetune_step",
    "caption": "benchmarks.decode_captions",
    "checkpoint": "benchmarks.checkpoint_stall",
    "restore": "benchmarks.restore",
    "growth": "benchmarks.growth",
    "startup": "benchmarks.startup",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    given = sys.argv[1:2]
    if not given or given[0] not in BENCHMARKS:
        parser.parse_args(given)  # --help, or what is wrong with it
        return
    # only now: the modules import torch, and detectron2, whose bridges virtex_d2 lays before
    sys.path.insert(0, str(ROOT))
    from virtex_d2.engine.errors import exit_on_input_error

    module = importlib.import_module(BENCHMARKS[given[0]])
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {given[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    can_profile = hasattr(module, "profile")
    if can_profile:
        parser.add_argument("--profile", action="store_true", help="a table by operator instead")
    module.add_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    profiles = can_profile and args.profile
    if profiles and args.json:
        parser.error("--json: --profile has no figures to write")
    with exit_on_input_error():
        if profiles:
            print(module.profile(args))
            return
        found = module.measure(args)
    print(module.report(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
