"""Kills whole trees of processes, and compares what their runs have left."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch


def kill_tree(pid: int) -> None:
    """kill -9 a process and all that it has started."""
    for one in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have: torchrun's have no group."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def differences(one: object, other: object, name: str = "") -> Iterator[str]:
    """Names of what is not identical in two checkpoints: model, optimizer, schedule, Lookahead."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            yield f"{name}: keys"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{name}: length"
        for index, (a, b) in enumerate(zip(one, other)):
            yield from differences(a, b, f"{name}.{index}")
    elif isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield name
    elif one != other:
        yield f"{name}: {one} and {other}"
