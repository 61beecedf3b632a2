"""How time and memory grow where there is more of something, all else being equal.

Each quantity is doubled, three times by default, in a process of its own for each size: opening
caption files by images and by captions of an image; the pretraining step by images, captions'
length and vocabulary; the fine-tuning step by pixels, objects and classes. Seconds are the
processor's, medians over rounds; memory is what a run of it takes at most beyond what was there
before (of steps: before the model was built).

Besides, the resident size of one process against its iterations, where every iteration has words or
images of new shapes, in bfloat16: what keeps something for each shape shows there.

The exponent of the last doubling is log2 of its ratio: 1 is linear; less, where something that does
not grow takes its part; 2 is quadratic.
"""

import argparse
import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import finetune_step, pretrain_step
from benchmarks.measuring import machine, peak_memory, resident_memory
from benchmarks.open_annotations import write_annotations
from benchmarks.rounds import count, spread
from pretrain.data.formats import load_coco_captions

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
Work = Callable[[], object]


def _captions(folder: Path, num_images: int, captions_per_image: int) -> Work:
    # by another process: what writing takes would be counted as reading's
    written = FORK.Process(target=write_annotations, args=(folder, num_images, captions_per_image))
    written.start()
    written.join()
    if written.exitcode:
        raise RuntimeError(f"{num_images} images' captions could not be written to {folder}")
    return lambda: load_coco_captions(folder / "captions.json", folder / "images")


def _arguments(module, **options: int | tuple[int, int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--threads", "1"])
    return argparse.Namespace(**vars(args) | options)


def _pretraining(**options: int) -> Work:
    args = _arguments(pretrain_step, **{"batch": 4, "size": 64, "width": 512} | options)
    return pretrain_step.Setting(args, ("ours",)).ways["ours"]


def _fine_tuning(**options: int | tuple[int, int]) -> Work:
    args = _arguments(finetune_step, **{"images": 1, "size": (256, 256)} | options)
    cfg = finetune_step.config(args, "SOLVER.AMP.ENABLED", False)
    return finetune_step.Way(args, cfg, stock=False)


# What grows -> its smallest size, and the work of a size: of (size, an empty folder).
CASES: dict[str, tuple[int, Callable[[int, Path], Work]]] = {
    "caption files: images": (10_000, lambda n, folder: _captions(folder, n, 5)),
    "caption files: captions of an image": (5, lambda n, folder: _captions(folder, 2_000, n)),
    "pretraining: images of a batch": (4, lambda n, _: _pretraining(batch=n)),
    "pretraining: words of a caption": (15, lambda n, _: _pretraining(words=n)),
    "pretraining: pieces of the vocabulary": (5_000, lambda n, _: _pretraining(vocab=n)),
    "fine-tuning: pixels": (256**2, lambda n, _: _fine_tuning(size=_sides(n))),
    "fine-tuning: objects of an image": (10, lambda n, _: _fine_tuning(objects=n)),
    "fine-tuning: classes": (150, lambda n, _: _fine_tuning(classes=n)),
}


def _new_captions() -> Work:
    options = {"batch": 32, "size": 32, "width": 512, "vocab": 1000}
    args = _arguments(pretrain_step, **options)
    setting, seeds = pretrain_step.Setting(args, ("ours",)), itertools.count()

    def work() -> None:
        setting.batch = pretrain_step.make_batch(args, next(seeds))
        setting.ways["ours"]()

    return work


def _new_sizes() -> Work:
    args = _arguments(finetune_step, images=1, size=(256, 256))
    cfg = finetune_step.config(args, "SOLVER.AMP.ENABLED", True)

    def batches() -> Iterator[list[dict]]:
        random = torch.Generator().manual_seed(0)
        while True:
            args.size = tuple(torch.randint(160, 417, (2,), generator=random).tolist())
            yield finetune_step.make_batch(args, cfg)

    return finetune_step.Way(args, cfg, stock=False, batches=batches())


# What an iteration is one of -> the iteration.
RESIDENT: dict[str, Callable[[], Work]] = {
    "pretraining: new captions": _new_captions,
    "fine-tuning: new image sizes": _new_sizes,
}


def _sides(pixels: int) -> tuple[int, int]:
    """Height and width, multiples of 32, of 2**k pixels."""
    exponent = int(math.log2(pixels))
    return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--doublings", type=count, default=3, help="of each quantity (default 3)")
    parser.add_argument("--rounds", type=count, default=3, help="turns of each size (default 3)")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[*CASES, *RESIDENT],
        default=[*CASES, *RESIDENT],
        metavar="NAME",
        help=f"default: all of {', '.join(map(repr, [*CASES, *RESIDENT]))}",
    )
    parser.add_argument(
        "--iterations", type=count, default=160, help="of resident sizes, at most (default 160)"
    )


def measure(args: argparse.Namespace) -> dict:
    """By case "sizes", "seconds", "memory_bytes", and the exponents of the last doubling of both;
    in "resident" by case "iterations" and "memory_bytes" then.

    Raises:
        RuntimeError: a size could not be measured; what went wrong is printed by its process.
    """
    torch.set_num_threads(1)
    found, resident = {}, {}
    marks = [args.iterations // part for part in (8, 4, 2, 1) if args.iterations >= part]
    for name in args.cases:
        if name in RESIDENT:
            memory = _in_a_process(_report_resident, RESIDENT[name], marks)
            resident[name] = {"iterations": marks, "memory_bytes": memory}
            continue
        smallest, prepare = CASES[name]
        sizes = [smallest * 2**doubling for doubling in range(args.doublings + 1)]
        turns = [_in_a_process(_report, prepare, size, args.rounds) for size in sizes]
        seconds = [spread(turn["seconds"])["median"] for turn in turns]
        memory = [turn["memory"] for turn in turns]
        found[name] = {
            "sizes": sizes,
            "seconds": seconds,
            "memory_bytes": memory,
            "exponent_of_seconds": _exponent(seconds),
            "exponent_of_memory": _exponent(memory),
        }
    found = {"cases": found, "resident": resident}
    return {"settings": vars(args), "machine": machine(CPU), **found}


def _exponent(values: list[float]) -> float | None:
    """None where the last two are not positive: nothing was taken that shows."""
    return math.log2(values[-1] / values[-2]) if min(values[-2:]) > 0 else None


def _in_a_process(report: Callable, prepare: Callable, size: int | list[int], *more: int):
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(sender, prepare, size, *more))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"size {size} could not be measured") from None
    finally:
        process.join()


def _report(sender: Connection, prepare: Callable, size: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = resident_memory(CPU)
        work = prepare(size, Path(folder))
        work()
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        sender.send({"seconds": seconds, "memory": peak_memory(work, CPU) - before})


def _report_resident(sender: Connection, prepare: Callable[[], Work], marks: list[int]) -> None:
    work, memory = prepare(), []
    for iteration in range(1, marks[-1] + 1):
        work()
        if iteration in marks:
            memory.append(resident_memory(CPU))
    sender.send(memory)


def report(found: dict) -> str:
    """The figures as text: a line for each quantity, seconds and MiB of each size."""
    lines = [f"{found['machine']['device']}, {found['machine']['threads']} threads"]
    for name, case in found["cases"].items():
        lines += [
            f"{name}: {', '.join(map(str, case['sizes']))}",
            f"    {_row(case['seconds'], 1)} s    exponent {_told(case['exponent_of_seconds'])}",
            f"    {_row(case['memory_bytes'], 2**20)} MiB  exponent "
            f"{_told(case['exponent_of_memory'])}",
        ]
    for name, case in found["resident"].items():
        memory = case["memory_bytes"]
        lines += [
            f"{name}: resident after {', '.join(map(str, case['iterations']))} iterations",
            f"    {_row(memory, 2**20)} MiB  {memory[-1] / memory[0] - 1:+.0%}",
        ]
    return "\n".join(lines)


def _row(values: list[float], unit: int) -> str:
    return " ".join(f"{value / unit:9.3g}" for value in values)


def _told(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"
