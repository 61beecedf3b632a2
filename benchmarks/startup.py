"""How long tools take to start: --help, the first iteration of a run, annotations of COCO's size.

- help: each tool's --help in a process of its own, in turns with `import torch, detectron2`: what
  a tool would wait for at least that imported them before it read its arguments.
- runs: ResNet-50 pretraining and Mask R-CNN R50-FPN fine-tuning from its backbone, on a generated
  world, from the command to "imported" (the log begins), "built" (data, model and optimizer are
  there) and "first" (the first iteration is logged).
- annotations: opening captions of COCO train2017's size, in turns with json.load and a list.

Medians over rounds; seconds of the clock, and of the processor without data loader workers, which
other programs on the machine disturb less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.rounds import count, spread

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("help", "runs", "annotations")
IMPORTS = ("-c", "import torch, detectron2")
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
# What a run says for the first time -> how far it has come.
MARKS = {
    "Environment:": "imported",
    "Starting training from iteration 0": "built",
    " iter: 0 ": "first",
}
TICKS = os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--rounds", type=count, default=3, help="repetitions of each (default 3)")


def measure(args: argparse.Namespace) -> dict:
    """The parts that `args.parts` names, by name.

    Every time is {"median", "min", "max"} in seconds over `args.rounds`.

    Raises:
        RuntimeError: a command did not do what is measured.
    """
    parts = {"help": _measure_help, "runs": _measure_runs, "annotations": _measure_annotations}
    return {name: parts[name](args.rounds) for name in args.parts}


def _measure_help(rounds: int) -> dict:
    commands = {"import torch, detectron2": IMPORTS}
    commands |= {tool: (str(ROOT / "tools" / tool), "--help") for tool in TOOLS}
    times = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            said, marks = _timed(arguments, {"": "begun"})
            if name in TOOLS and "usage: " not in said:
                raise RuntimeError(f"{name} --help does not say how it is used:\n{said}")
            times[name].append(marks["ended"])
    return {name: _both(values) for name, values in times.items()}


def _measure_runs(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = folder / "world"
        _timed(
            (str(ROOT / "tools/make_shapes.py"), "--output", str(world), "--num-images", "64"), {}
        )
        times: dict[str, dict[str, list]] = {}
        for number in range(rounds):
            pretrained = folder / f"pretrain-{number}"
            commands = {
                "import torch, detectron2": IMPORTS,
                "pretrain": _pretraining(world, pretrained),
                "finetune": _fine_tuning(world, folder / f"finetune-{number}", pretrained),
            }
            for what, arguments in commands.items():
                said, marks = _timed(arguments, MARKS)
                if arguments is not IMPORTS and not set(MARKS.values()) <= set(marks):
                    raise RuntimeError(f"{what}: came only to {list(marks)}:\n{said[-2000:]}")
                for mark, value in marks.items():
                    times.setdefault(what, {}).setdefault(mark, []).append(value)
    return {
        what: {mark: _both(values) for mark, values in marks.items()}
        for what, marks in times.items()
    }


def _pretraining(world: Path, output: Path) -> Sequence[str]:
    config = ROOT / "configs/pretrain/shapes_R_50.yaml"
    captions, images = world / "annotations/captions_train.json", world / "images/train"
    return [
        *(str(ROOT / "tools/pretrain_net.py"), "--config-file", str(config)),
        *("DATA.TRAIN_CAPTIONS", str(captions), "DATA.TRAIN_IMAGES", str(images)),
        *("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
        *("LOG_PERIOD", "1", "SEED", "1", "OUTPUT_DIR", str(output)),
    ]


def _fine_tuning(world: Path, output: Path, pretrained: Path) -> Sequence[str]:
    config = ROOT / "configs/shapes/mask_rcnn_R_50_FPN.yaml"
    annotations, images = world / "annotations/instances_train.json", world / "images/train"
    return [
        *(str(ROOT / "tools/train_net.py"), "--config-file", str(config)),
        *("VIRTEX.DATASETS", repr([["world", "coco", str(annotations), str(images)]])),
        *("DATASETS.TRAIN", "('world',)", "DATASETS.TEST", "()"),
        *("TEST.PRECISE_BN.ENABLED", "False"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
        *("SOLVER.IMS_PER_BATCH", "2", "VIRTEX.LOG_PERIOD", "1", "SEED", "1"),
        *("MODEL.WEIGHTS", str(pretrained / "backbone.safetensors"), "OUTPUT_DIR", str(output)),
    ]


def _timed(
    arguments: Sequence[str], marks: dict[str, str]
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Run `python *arguments` from the project's folder.

    Args:
        marks: the beginning of a stage by what a line says that announces it.

    Returns:
        All that it said, and seconds (clock, processor) from the command to each mark, and "ended".
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, found = [], {}
    try:
        with process.stdout:
            for line in process.stdout:
                said.append(line)
                for words, mark in marks.items():
                    if words in line and mark not in found:
                        found[mark] = (time.perf_counter() - start, _processor_seconds(process.pid))
    except BaseException:
        process.kill()  # a benchmark that is interrupted leaves nothing running
        raise
    _, status, usage = os.wait4(process.pid, 0)
    found["ended"] = (time.perf_counter() - start, usage.ru_utime + usage.ru_stime)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{''.join(said)[-2000:]}")
    return "".join(said), found


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime: proc_pid_stat(5)


def _measure_annotations(rounds: int) -> dict:
    from benchmarks.open_annotations import baseline, write_annotations
    from pretrain.data.formats import load_coco_captions

    ways: dict[str, Callable] = {
        "json.load and a list": baseline,
        "this project": load_coco_captions,
    }
    times = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        path, images = write_annotations(Path(folder))
        megabytes = path.stat().st_size / 1e6
        for _ in range(rounds):
            ends = []
            for name, load in ways.items():
                start = time.perf_counter(), time.process_time()
                records = load(path, images)
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
                ends.append((len(records), records[0], records[len(records) - 1]))
                del records
            if ends[0] != ends[1]:
                raise RuntimeError(f"the two ways read other records: {ends}")
    return {"megabytes": megabytes, **{name: _both(values) for name, values in times.items()}}


def _both(values: list[tuple[float, float]]) -> dict:
    """{"seconds", "processor_seconds"} of what was measured in each round."""
    clock, processor = zip(*values)
    return {"seconds": spread(clock), "processor_seconds": spread(processor)}


def report(result: dict) -> str:
    """The figures as text."""
    lines = [f"{'seconds: median (least to most)':44} {'clock':>24} {'processor':>24}"]
    for part, content in result.items():
        for name, times in content.items():
            if isinstance(times, float):
                lines.append(f"{part}: {name} {times:.0f}")
                continue
            stages = {"": times} if "seconds" in times else times
            for stage, value in stages.items():
                told = (_told(value[key]) for key in ("seconds", "processor_seconds"))
                lines.append(" ".join([f"{f'{part}: {name} {stage}':44}", *told]))
    return "\n".join(lines)


def _told(times: dict[str, float]) -> str:
    return f"{times['median']:9.2f} ({times['min']:.2f} to {times['max']:.2f})".rjust(24)
