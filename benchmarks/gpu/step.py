"""A step of the check, in a process of its own: what it is given, and where it puts what it finds.

    python -m benchmarks.gpu.step pretraining --folder output/gpu/work --seconds 60

Every check goes to disk at once, so that a step that is ended by its time limit leaves what it had.
"""

import argparse
import gc
import importlib
import json
import math
import os
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import virtex_d2  # noqa: F401 - lays detectron2's bridges
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.parent import end_with_parent

from .plan import STEPS


@dataclass(frozen=True)
class Scale:
    """How large the steps' work is."""

    network: str
    width: int  # of the decoder
    batch: int
    small_batch: int
    crop: int  # pixels
    iterations: int
    images: int  # of the world
    side: int  # of its images, pixels
    vocabulary: int
    detector_images: int
    detector_size: tuple[int, int]
    workers: tuple[int, ...]
    rounds: int


SCALES = {
    "cuda": Scale(
        *("resnet50", 2048, 256, 32, 224, 40, 384, 512, 10_000, 4, (800, 1333), (8, 12, 15), 5)
    ),
    "cpu": Scale(*("resnet18", 64, 4, 2, 64, 6, 8, 96, 100, 2, (96, 128), (1, 2), 2)),
}


class Step:
    """What a step is given, and its record.

    Args:
        name: of the step.
        folder: for its files; shared by all steps.
        device: "cuda" or "cpu".
        seconds: that it may take.
        options: `captions` and `voc`, folders.
    """

    def __init__(self, name: str, folder: Path, device: str, seconds: float, **options: str):
        self.name, self.folder, self.device = name, folder, torch.device(device)
        self.scale, self.options = SCALES[device], options
        self.cuda = device == "cuda"
        self._end = time.monotonic() + seconds
        self.found: dict[str, Any] = {"device": device, "checks": [], "figures": {}, "notes": []}

    @property
    def left(self) -> float:
        """Seconds until the step is ended."""
        return self._end - time.monotonic()

    def check(self, name: str, passed: bool, told: str = "") -> None:
        """Record what can be right or wrong."""
        self.found["checks"].append({"name": name, "passed": bool(passed), "told": told})
        print(f"{'pass' if passed else 'FAIL'}: {name}: {told}", flush=True)
        self.write()

    def finite(self, name: str, losses: list[float]) -> list[float]:
        """Record whether losses, of which there are some, are finite numbers; returns them."""
        right = bool(losses) and all(map(math.isfinite, losses))
        self.check(
            f"{name}: finite", right, f"{losses[0]:.4f} to {losses[-1]:.4f}" if right else ""
        )
        return losses

    def fresh(self, name: str) -> Path:
        """An empty folder of that name among the step's own."""
        folder = self.folder / self.name / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def free(self, *trainers: object) -> None:
        """Give the device's memory of trainers back that nobody else has."""
        for trainer in trainers:
            trainer.__dict__.clear()  # hooks and trainers refer to each other
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def limit(self, name: str, value: float, unit: str, **bounds: float) -> None:
        """A figure that has to be `least` or `most` on a GPU; on a CPU it is no more than noted.

        A machine that does other things meanwhile would fail at seconds that say nothing.
        """
        told = f"{value:.3g} {unit}".strip()
        asked = ", ".join(f"at {which} {bound:g}" for which, bound in bounds.items())
        if not self.cuda:
            self.note(f"{name}: {told}; its limit ({asked}) is for GPUs, not on a CPU")
            return
        within = bounds.get("least", value) <= value <= bounds.get("most", value)
        self.check(name, within, f"{told} ({asked})")

    def figure(self, name: str, value: Any) -> None:
        """Record a number, or a table of numbers."""
        self.found["figures"][name] = value
        self.write()

    def note(self, text: str) -> None:
        """Record what the report says beside the figures."""
        if text not in self.found["notes"]:
            self.found["notes"].append(text)
        self.write()

    def instead(self, what: str, done: str) -> None:
        """On a CPU: say what cannot be done there, and what is done in its place."""
        self.note(f"{what}: not on a CPU; {done} instead")

    def headline(self, text: str) -> None:
        """The figure of the step's line."""
        self.found["headline"] = text
        self.write()

    def late(self, part: str, seconds: float) -> bool:
        """Whether a part of so many seconds (on a GPU) does not fit any more, which is no pass."""
        if not self.cuda or self.left > seconds:
            return False
        self.check(part, False, f"no time left for it: it takes some {seconds:g} s")
        return True

    def write(self) -> None:
        """Put the record on disk."""
        with atomic_path(self.folder / f"{self.name}.json") as temporary:
            temporary.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("auto", *SCALES), default="auto")
    parser.add_argument("--parent", type=int, help="end with this process")
    parser.add_argument("--captions", default="")
    parser.add_argument("--voc", default="")
    args = parser.parse_args()
    if args.parent:
        end_with_parent(signal.SIGKILL, args.parent)
    # before anything logs: a file of work that is left over must not be mistaken for a result
    (args.folder / f"{args.name}.json").unlink(missing_ok=True)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # as training has it
    given = {"captions": args.captions, "voc": args.voc}
    step = Step(args.name, args.folder, device, args.seconds, **given)
    try:
        importlib.import_module(f"benchmarks.gpu.{STEPS[args.name].module}").run(step)
    except Exception as error:
        traceback.print_exc()
        step.check("ends without an error", False, f"{type(error).__name__}: {error}"[:600])
    step.found["ended"] = True
    step.write()
    os._exit(0)  # threads of a library that hang are no finding: "processes" looks at ends


if __name__ == "__main__":
    main()
