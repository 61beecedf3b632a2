"""What an image can be restored from, by name: x2, x3, x4, derain, noise30, noise50, ..."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from virtex_d2.engine.errors import InputError

# The order of heads, tails and embedding rows in the released six-task checkpoint.
SIX_TASKS = ("x2", "x3", "x4", "derain", "noise30", "noise50")

_NAME = re.compile(r"x([2-4])|derain|noise([1-9]\d{0,2})")


class Task(NamedTuple):
    """How an image was degraded.

    Attributes:
        name: as in `SIX_TASKS`.
        scale: how many times larger the restored image is on a side.
        sigma: standard deviation of normal noise, on the scale 0-255; 0 is none.
        rain: whether there are rain streaks.
    """

    name: str
    scale: int = 1
    sigma: int = 0
    rain: bool = False


def parse_task(name: str) -> Task:
    """The task that a name stands for: "x4" -> Task("x4", scale=4)."""
    match = _NAME.fullmatch(name)
    if match is None or (match[2] and int(match[2]) > 255):
        raise InputError(
            f"{name!r} is no task: expected x2, x3, x4, derain, or noise with its standard "
            "deviation from 1 to 255, such as noise30."
        )
    return Task(name, int(match[1] or 1), int(match[2] or 0), name == "derain")


def parse_tasks(names: Sequence[str], key: str) -> list[Task]:
    """`parse_task` of each; at least one, none twice. `key` is the config's, for messages."""
    names = [str(name) for name in names]
    if not names or len({*names}) < len(names):
        raise InputError(
            f"{key} {names}: expected one task or several different ones, such as "
            f"{list(SIX_TASKS)}."
        )
    try:
        return [parse_task(name) for name in names]
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
