"""Which of a run's numbered checkpoints stay; told from their names alone."""

import re
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.errors import InputError

# fvcore's names: model_0000999.pth is what there was after iteration 999, the thousandth.
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


@dataclass(frozen=True)
class Retention:
    """Keep the last so many checkpoints, and one of every so many iterations for good.

    fvcore's `max_to_keep` knows the checkpoints of its own process, so that each restart leaves as
    many more behind; here the folder is asked. What has another name (model_final, model_best,
    model_ema) is never removed.

    Attributes:
        last: how many; 0: all. With 1 there is none to fall back to when it is damaged.
        every: in iterations; the first checkpoint after each so many stays. 0: none does.
    """

    last: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        if self.last < 0 or self.every < 0:
            raise InputError(
                f"SOLVER.CHECKPOINT_KEEP_LAST is {self.last} and CHECKPOINT_KEEP_EVERY "
                f"{self.every}; expected a number of checkpoints and one of iterations, or 0."
            )

    def removable(self, numbers: list[int], newest: int) -> list[int]:
        """Which of the iterations with a checkpoint may lose it, once `newest` has one.

        Later ones than `newest` are of a part of the run that is being repeated: they do not count
        as its last ones, and stay until they are written again.
        """
        if not self.last:
            return []
        numbers = sorted(number for number in numbers if number <= newest)
        for_good: dict[int, int] = {}
        for number in numbers if self.every else ():
            for_good.setdefault((number + 1) // self.every, number)
        for_good.pop(0, None)  # before the first `every` iterations
        return [number for number in numbers[: -self.last] if number not in for_good.values()]

    def prune(self, folder: Path, name: str) -> None:
        """Remove what may go after `name`, such as "model_0000999.pth", was written whole."""
        newest = iteration_of(name)
        if newest is not None and self.last:
            files = numbered_checkpoints(folder)
            for number in self.removable(list(files), newest):
                files[number].unlink(missing_ok=True)

    def count(self, first: int, last: int, period: int) -> int:
        """How many numbered checkpoints there are at most at a time.

        Args:
            first, last: iterations that are trained, from `first` to before `last`.
            period: iterations between checkpoints.
        """
        written = last // period - first // period
        if not self.last:
            return written
        for_good = last // self.every - first // self.every + 1 if self.every else 0
        # One more than are kept: the oldest goes when the newest is there.
        return min(written, self.last + 1 + for_good)


def iteration_of(name: str) -> int | None:
    """The iteration in a name such as model_0000999.pth; None in others."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The files model_<iteration>.pth of a folder, by iteration, in order."""
    found = {iteration_of(path.name): path for path in folder.glob("model_*.pth")}
    found.pop(None, None)
    return dict(sorted(found.items()))
