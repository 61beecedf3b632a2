"""What a run has recorded: curves of its metrics.json."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError


@dataclass(frozen=True)
class Curve:
    """One number against iterations done (1 after the first)."""

    iterations: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def last(self) -> float:
        """The value at the end."""
        return self.values[-1]


class Metrics:
    """A run's metrics.json.

    Args:
        path: of JSON lines, each with "iteration", as detectron2's JSONWriter writes them.
        iterations: the run's length: what is recorded after the last iteration belongs to it.
    """

    def __init__(self, path: Path, iterations: int):
        self.path = path
        self._iterations = iterations
        self._records = _read_records(path)

    @property
    def keys(self) -> list[str]:
        """Everything that was recorded, in the order of its first time."""
        return list(dict.fromkeys(key for record in self._records for key in record))

    @property
    def training_seconds(self) -> float:
        """Of all iterations, without what came between them; 0 where `time` was not recorded.

        The recorded time is the median of the iterations since the record before.
        """
        curve = self.curve("time")
        starts = (0, *curve.iterations)
        return sum(
            seconds * (end - start)
            for start, end, seconds in zip(starts, curve.iterations, curve.values)
        )

    def curve(self, key: str) -> Curve:
        """A number's course; empty where it was never recorded.

        What a resumed run recorded replaces what the stopped one had of the same iteration.
        """
        points = {
            min(record["iteration"] + 1, self._iterations): float(record[key])
            for record in self._records
            if key in record
        }
        ordered = sorted(points.items())
        return Curve(tuple(i for i, _ in ordered), tuple(value for _, value in ordered))

    def evaluated(self, key: str) -> Curve:
        """As `curve`, of a number that an evaluation must have recorded."""
        curve = self.curve(key)
        if not curve:
            raise InputError(f"{self.path}: expected {key} of an evaluation; there is none.")
        return curve


def mean_and_spread(values: Sequence[float], signed: bool = False) -> str:
    """ "12.3 ± 0.4" (standard deviation), or "12.3" for one value."""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the run's metrics: {error.strerror}.") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that was killed while it wrote
        if isinstance(record, dict) and "iteration" in record:
            records.append(record)
    if not records:
        raise InputError(f"{path}: expected JSON lines with an iteration each, found none.")
    return records
