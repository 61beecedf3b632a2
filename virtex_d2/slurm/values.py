"""What Slurm's own values mean: time limits, arrays, options of sbatch."""

import itertools
import re
from collections.abc import Iterator

from virtex_d2.engine.errors import InputError

_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
# Options of sbatch that the script sets, with the tool's for each.
_TAKEN = {
    **{name: name for name in ("nodes", "cpus-per-task", "time", "partition", "account", "qos")},
    **{name: name for name in ("constraint", "array", "dependency", "gpus-per-node")},
    "job-name": "name",
    "mem": "memory",
    "ntasks": "tasks-per-node",
    "ntasks-per-node": "tasks-per-node",
    "output": "logs",
    "signal": "stop-before",
}
_SHORT = {
    "A": "account",
    "C": "constraint",
    "D": "chdir",
    "G": "gpus",
    "J": "job-name",
    "N": "nodes",
    "a": "array",
    "c": "cpus-per-task",
    "d": "dependency",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
}
_FIXED = ("chdir", "open-mode", "kill-on-invalid-dep")  # those that have none


def seconds(limit: str) -> int:
    """Of a time limit as Slurm reads it; 0 where there is none."""
    if not re.match(r"\d", limit):
        return 0
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # DAYS-HOURS[:MINUTES[:SECONDS]]
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:  # MINUTES[:SECONDS]
        hours, (minutes, secs) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def array_numbers(spec: str) -> Iterator[int]:
    """The numbers of an array's jobs."""
    wrong = InputError(f"--array: expected numbers such as 0-17, 1,3,5 or 0-17%4, found '{spec}'.")
    if not _ARRAY.fullmatch(spec):
        raise wrong
    numbers, _, at_once = spec.partition("%")
    ranges = []
    for part in numbers.split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        if int(last or first) < int(first) or step == "0" or at_once == "0":
            raise wrong
        ranges.append(range(int(first), int(last or first) + 1, int(step or 1)))
    return itertools.chain.from_iterable(ranges)


def check_sbatch(line: str, gpus_per_node: str, memory: str) -> None:
    """Refuse a line of --sbatch that would take the place of what the script asks for.

    Args:
        line: an option of sbatch.
        gpus_per_node, memory: those of the job; "" where it has none.
    """
    name, value = _of_sbatch(line)
    if name in _TAKEN:
        raise InputError(f"--sbatch {line}: the script asks for it already; use --{_TAKEN[name]}.")
    if name in _FIXED:
        raise InputError(f"--sbatch {line}: the script sets it itself; leave it out.")
    of_gpus = name in ("gpus", "gpus-per-task", "ntasks-per-gpu")
    if gpus_per_node and (of_gpus or (name == "gres" and "gpu" in value)):
        raise InputError(
            f"--sbatch {line}: contradicts --gpus-per-node {gpus_per_node}. Where the site wants "
            "it so, say --gpus-per-node 0, and how many --tasks-per-node."
        )
    if memory and name in ("mem-per-cpu", "mem-per-gpu"):
        raise InputError(f"--sbatch {line}: contradicts --memory {memory}; give one of the two.")


def _of_sbatch(line: str) -> tuple[str, str]:
    """The option's long name, and its value: of "time=5", "--time 5", "-t 5" and "-t5"."""
    match = re.match(r"-([A-Za-z])(.*)", line.strip())
    if match:
        return _SHORT.get(match[1], match[1]), match[2].strip()
    name, value = re.match(r"(?:--)?([^=\s]*)(.*)", line.strip()).groups()
    return name, value
