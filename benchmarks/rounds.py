"""How benchmarks compare: ways take turns in one process, and neighbouring turns are compared.

Ratios of neighbours are what is claimed: on a shared machine seconds are worth little.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence


def count(text: str) -> int:
    """The type of an argument that counts: a whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def take_turns(
    ways: Mapping[str, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Every way once a round; what each returned of each round, warm-up left out."""
    for _ in range(warm_up):
        for way in ways.values():
            way()
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            turns[name].append(way())
    return turns


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def split(turns: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part."""
    return {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, by round."""
    return spread([theirs / mine for theirs, mine in zip(baseline, ours, strict=True)])
