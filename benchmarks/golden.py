"""The same small runs by two checkouts of this project: what they leave must be equal, bit by bit.

    python benchmarks/golden.py --against OTHER_CHECKOUT --output DIR [--runs pretrain FPN C4 probe]

Runs each of pretraining, an FPN and a C4 detector and a linear probe on 1 and 2 processes, and the
first three killed (SIGKILL, behind their first checkpoint) and resumed. Compared are exit codes,
all that the last checkpoint holds and all numbers of metrics.json but times. On one machine:
processors differ in the last bit. A folder that holds a finished run's results is not run again.
Ends with code 1 where something differs, and names it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.kill_cases import CASES, World  # noqa: E402
from tests.e2e.killing import differences, kill_tree  # noqa: E402
from tests.probes.small_sets import COLOURS, picture  # noqa: E402

# What has been added and is no difference of a run: the gradients' norm in a detector's metrics,
# skipped files in its checkpoint. (A probe's metrics are compared in its results.json.)
NEW, ADDED_STATE = ("grad_norm",), ".checkpoint.trainer.hooks: keys"
TIMES = ("time", "eta", "images_per_second", "seconds", "max_mem")
PROBE = "probe"


def _command(world: World, name: str, code: Path, output: Path, folder: Path) -> list[str]:
    """Arguments of the interpreter, the tool first, for a checkout."""
    if name == PROBE:
        weights = folder / "runs" / code.name / "pretrain-1" / "backbone.safetensors"
        options = [
            *("TASK", "linear", "DATA.FORMAT", "folders", "DATA.TRAIN", "train"),
            *("DATA.TEST", "val", "DATA.ROOT", folder / "colours", "INPUT.CROP", 32),
            *("INPUT.RESIZE", 40, "DATA.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"),
            *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.EPOCHS", 3, "MODEL.WEIGHTS", weights),
        ]
        command = [code / "tools" / "linear_probe.py", *options, "OUTPUT_DIR", output]
    else:
        command = world.command(CASES[name], output)
    # with the whole networks: the other checkout may not have the tests' thin ones
    words = (str(part).replace("/tests/thin/", "/tools/") for part in command)
    return [word.replace(f"{ROOT}/", f"{code}/") for word in words]


def _write_colours(folder: Path) -> None:
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = picture(colour, i + 100 * (split == "val"))
                image.save(folder / split / name / f"{i}.png")


def _start(command: list[str], code: Path, processes: int, log: Path) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), *command],
            cwd=code,
            env=environment,
            stdout=file,
            stderr=file,
        )


def run(world: World, name: str, code: Path, folder: Path, processes: int, killed: bool) -> Path:
    """Run it, or find it finished.

    Returns:
        OUTPUT_DIR, with the run's exit code in `golden.json`.
    """
    output = folder / "runs" / code.name / f"{name}-{processes}{'-killed' * killed}"
    done = output / "golden.json"
    if done.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    command, log = _command(world, name, code, output, folder), output.with_suffix(".log")
    if killed:
        process = _start(command, code, processes, log)
        while process.poll() is None and not list(output.glob("model_*.pth")):
            time.sleep(0.05)
        kill_tree(process.pid)
        process.wait()
    status = _start(command, code, processes, log).wait()
    output.mkdir(exist_ok=True)
    done.write_text(json.dumps({"exit code": status}))
    return output


def left(output: Path) -> dict:
    """What a run has left: exit code, everything in its last checkpoint, numbers but times."""
    found = json.loads((output / "golden.json").read_text())
    last = output / "model_final.pth"
    found["checkpoint"] = torch.load(last, weights_only=True) if last.exists() else None
    metrics = output / "metrics.json"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    found["metrics"] = {}
    for record in map(json.loads, lines):
        numbers = {k: repr(v) for k, v in record.items() if not any(t in k for t in (*TIMES, *NEW))}
        found["metrics"].setdefault(str(record["iteration"]), {}).update(numbers)
    results = output / "results.json"
    if results.exists():
        found["metrics"] = json.loads(results.read_text())["metrics"]
    return found


def compare(args: argparse.Namespace) -> Iterator[str]:
    """Run all, and yield a line for each thing that differs."""
    folder = args.output.resolve()
    world_folder = folder / "world"
    if not world_folder.exists():
        World(world_folder)
        _write_colours(folder / "colours")
    world = World.__new__(World)
    world._captions, world._shapes = world_folder / "captions", world_folder / "shapes"
    for name in args.runs:
        for processes in (1, 2):
            for killed in (False, True) if name != PROBE else (False,):
                one, other = (
                    left(run(world, name, code, folder, processes, killed))
                    for code in (args.against.resolve(), ROOT)
                )
                title = f"{name}, {processes} process(es){', killed and resumed' * killed}"
                found = [line for line in differences(one, other) if line != ADDED_STATE]
                print(f"{title}: {'equal' if not found else f'{len(found)} differ'}", flush=True)
                yield from (f"{title}: {line}" for line in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    names = [*CASES, PROBE]
    parser.add_argument("--runs", nargs="+", choices=names, default=names)
    differing = list(compare(parser.parse_args()))
    print("\n".join(differing[:50]))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
