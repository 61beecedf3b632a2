"""How long a checkpoint keeps training waiting: in place, in the background, and fvcore's own.

A Mask R-CNN R50-FPN of this project with SGD's momentum, on the CPU, one thread. An iteration is
a stand-in: products of matrices, and an update of every weight in place. In each round every way
saves once, in the same process. "save" is the time until the call returns; "all" is how much longer
iterations take, from the call until the file is on disk, than as many without a checkpoint: that of
the background has both at work, and with a core to spare it is "save". fvcore's own neither waits
for the disk nor has a checksum, and writes over the file before.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fvcore.common.checkpoint import Checkpointer

from benchmarks.measuring import machine
from benchmarks.rounds import count, spread
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.checkpointer import AtomicCheckpointer, StateWriter, num_bytes
from virtex_d2.engine.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "coco" / "mask_rcnn_R_50_FPN_2x.yaml"


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The detector after its first update: momentum is there."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    cfg = load_config(get_virtex_cfg(), str(CONFIG), options)
    model = DetectionTrainer.build_model(cfg)
    optimizer = DetectionTrainer.build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


class Training:
    """Iterations of a fixed amount of work, counted in time."""

    def __init__(self, model: torch.nn.Module):
        self._weights = [parameter.data for parameter in model.parameters()]
        self._matrix = torch.randn(512, 512) / 30

    def iterate(self) -> None:
        for _ in range(8):
            self._matrix = (self._matrix @ self._matrix).tanh()
        torch._foreach_mul_(self._weights, 1.0)

    def seconds(self, iterations: int) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            self.iterate()
        return time.perf_counter() - start


def _save_once(
    training: Training, save: Callable[[], None], wait: Callable[[], None]
) -> tuple[float, float]:
    """Seconds of the call, and seconds that the iterations until all is on disk take longer."""
    start = time.perf_counter()
    save()
    returned = time.perf_counter()
    on_disk = threading.Thread(target=wait)
    on_disk.start()
    iterations = 0
    while on_disk.is_alive():
        training.iterate()
        iterations += 1
    end = time.perf_counter()
    on_disk.join()
    return returned - start, end - start - training.seconds(iterations)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: /tmp's)")
    parser.add_argument("--rounds", type=count, default=7, help="checkpoints of each (default 7)")


def measure(args: argparse.Namespace) -> dict:
    """All figures, in seconds."""
    torch.set_num_threads(1)
    model, optimizer = build()
    training = Training(model)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    turns: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ways = {
            "fvcore": Checkpointer(model, folder, optimizer=optimizer),
            "in place": AtomicCheckpointer(model, folder, optimizer=optimizer),
            "background": AtomicCheckpointer(
                model, folder, writer=StateWriter(background=True), optimizer=optimizer
            ),
        }
        size = num_bytes(ways["in place"].states())
        for turn in range(args.rounds + 1):
            for name, checkpointer in ways.items():
                wait = getattr(checkpointer, "wait", lambda: None)
                seconds = _save_once(
                    training, lambda c=checkpointer: c.save("model", iteration=0), wait
                )
                if turn:  # the first one warms up: the snapshot's memory is new
                    turns.setdefault(name, []).append(seconds)
    calls = {name: [call for call, _ in rows] for name, rows in turns.items()}
    return {
        "settings": vars(args),
        "machine": machine(torch.device("cpu")),
        "bytes": size,
        "save": {name: spread(values) for name, values in calls.items()},
        "all": {name: spread([whole for _, whole in rows]) for name, rows in turns.items()},
        "background_to_in_place": spread(
            [behind / wait for behind, wait in zip(calls["background"], calls["in place"])]
        ),
    }


def report(found: dict) -> str:
    """The figures as a table."""
    lines = [
        f"{found['bytes'] / 2**20:.0f} MiB, {found['settings']['rounds']} rounds, seconds",
        "| | save, median | save, max | all, median | all, max |",
        "|---|---|---|---|---|",
    ]
    for name, save in found["save"].items():
        whole = found["all"][name]
        numbers = (save["median"], save["max"], whole["median"], whole["max"])
        lines.append(f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    ratio = found["background_to_in_place"]
    lines.append(
        f"background / in place, save: median {ratio['median']:.3f}, max {ratio['max']:.3f}"
    )
    return "\n".join(lines)
