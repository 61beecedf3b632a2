#!/usr/bin/env python
"""Time and memory of taking a ResNet-50 out of a MoCo checkpoint, beside torch alone.

python benchmarks/convert_checkpoint.py

Prints, beyond importing: the seconds of torch.load and torch.save on the same file, of the
conversion, of the probe, and the growth of each one's peak memory.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.checkpoint.layout_files import EXAMPLES, FULL, random_resnet  # noqa: E402
from virtex_d2.checkpoint.convert import convert, verify  # noqa: E402
from virtex_d2.checkpoint.source import read_backbone  # noqa: E402


def measure(what: str, action: Callable[[], object]) -> float:
    """Run it in a process of its own, so that its peak memory is its own; returns the seconds."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(sender, f"{seconds} {grown}".encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as pipe:
        seconds, grown = map(float, pipe.read().split())
    os.waitpid(child, 0)
    print(f"{what:42} {seconds:6.2f} s   peak memory grew by {grown:5.0f} MiB", flush=True)
    return seconds


def write_source(folder: Path) -> None:
    EXAMPLES["moco v2"].write(folder, random_resnet(FULL, 1), random_resnet(FULL, 2))


def torch_alone(source: Path, dest: Path) -> None:
    state = torch.load(source, weights_only=True)["state_dict"]
    torch.save({key: value for key, value in state.items() if "encoder_q" in key}, dest)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, dest = folder / "moco.tar", folder / "backbone.safetensors"
        measure("write a file to convert", lambda: write_source(folder))
        print(f"{source.stat().st_size / 2**20:.0f} MiB: two ResNet-50 and a head; one thread")
        ours = measure(
            "convert to a backbone file", lambda: convert(str(source), str(dest), "backbone")
        )
        measure("read both, compare, probe", lambda: verify(str(dest), read_backbone(str(source))))
        theirs = measure(
            "torch.load and torch.save of one of them",
            lambda: torch_alone(source, folder / "half.pth"),
        )
        print(f"converting takes {ours / theirs:.1f} times as long as torch alone")


if __name__ == "__main__":
    main()
