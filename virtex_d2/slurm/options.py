"""What a job asks of Slurm, from a site's file, a pipeline's and the command line."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.slurm.values import array_numbers, check_sbatch, seconds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOGS = "output/slurm"
LAUNCHERS = ("srun", "torchrun")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|-1|UNLIMITED|INFINITE", re.IGNORECASE)
_TYPE = r"[^\s,:=]+"  # as in any gres.conf
_GPUS = re.compile(rf"({_TYPE}:\d+|\d+|{_TYPE})(,({_TYPE}:\d+|\d+|{_TYPE}))*")
_MEMORY = re.compile(r"\d+([KMGT]i?B?)?", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _about(text: str, metavar: str, flag: str = "") -> dict[str, str]:
    """What --help says of a field; `flag` where it is not the field's name."""
    return {"help": text, "metavar": metavar, "flag": flag}


@dataclass(frozen=True)
class JobOptions:
    """A job's options; each is a key of TOML files and, with dashes, a flag of the tool."""

    name: str = field(
        default="", metadata=_about("of the job (default: of the tool, or of the stage)", "NAME")
    )
    nodes: int = field(default=1, metadata=_about("number of nodes", "N"))
    gpus_per_node: str = field(default="", metadata=_about("0 for CPUs alone; 8 or TYPE:8", "N"))
    tasks_per_node: int = field(
        default=0, metadata=_about("processes (default: one a GPU, else one)", "N")
    )
    cpus_per_task: int = field(
        default=0, metadata=_about("of a process and its loader workers", "N")
    )
    memory: str = field(default="", metadata=_about("per node, e.g. 64G; 0 for all of it", "SIZE"))
    time: str = field(
        default="", metadata=_about("limit of each start, e.g. 24:00:00 or 2-00:00:00", "LIMIT")
    )
    partition: str = field(default="", metadata=_about("partition, or several with commas", "NAME"))
    account: str = field(default="", metadata=_about("whom to charge", "NAME"))
    qos: str = field(default="", metadata=_about("quality of service", "NAME"))
    constraint: str = field(default="", metadata=_about("features of nodes, e.g. a100", "FEATURES"))
    array: str = field(
        default="",
        metadata=_about("one job for each number, e.g. 0-17%%4; {array} in the command", "SPEC"),
    )
    dependency: str = field(default="", metadata=_about("Slurm's, e.g. afterok:1234", "SPEC"))
    modules: list = field(
        default_factory=list, metadata=_about("to load; repeat it", "NAME", flag="module")
    )
    conda: str = field(default="", metadata=_about("environment to activate", "ENV"))
    venv: str = field(
        default="", metadata=_about("folder of a virtual environment to activate", "DIR")
    )
    setup: list = field(
        default_factory=list, metadata=_about("a line of shell before the run; repeat it", "LINE")
    )
    container: str = field(
        default="",
        metadata=_about("goes before python: 'apptainer exec --nv image.sif'", "COMMAND"),
    )
    python: str = field(
        default="",
        metadata=_about("default: this one, or python in conda, venv, container", "FILE"),
    )
    env: dict = field(
        default_factory=dict, metadata=_about("environment of the run; repeat it", "NAME=VALUE")
    )
    launcher: str = field(
        default="srun",
        metadata=_about("srun starts every process, or torchrun on every node", "NAME"),
    )
    srun: list = field(
        default_factory=list,
        metadata=_about("another option of srun, without its dashes; repeat it", "OPTION"),
    )
    sbatch: list = field(
        default_factory=list,
        metadata=_about("another #SBATCH line, without dashes; repeat it", "OPTION"),
    )
    logs: str = field(
        default=LOGS,
        metadata=_about("folder for scripts and logs, seen by all nodes", "DIR"),
    )
    stop_before: int = field(
        default=120, metadata=_about("seconds before the time limit at which to stop", "SECONDS")
    )
    max_stuck: int = field(
        default=2, metadata=_about("restarts in a row without progress, then no more", "N")
    )

    def __post_init__(self) -> None:
        if not _GPUS.fullmatch(self.gpus_per_node):
            raise InputError(
                "--gpus-per-node: expected a number such as 8 or a100:8, or 0 for CPUs alone; "
                f"found '{self.gpus_per_node}'."
            )
        if self.time and not _TIME.fullmatch(self.time):
            raise InputError(
                f"--time: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, found "
                f"'{self.time}'."
            )
        limit = seconds(self.time)
        if limit and self.stop_before >= limit:
            raise InputError(
                f"--stop-before {self.stop_before}: the time limit {self.time} is {limit} seconds, "
                "so that the run would be asked to stop when it begins. Raise --time (24 are "
                "minutes, 24:00:00 hours), or lower --stop-before."
            )
        if self.array:
            array_numbers(self.array)
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise InputError(
                f"--memory: expected a size such as 64G or 500M, or 0 for all; found "
                f"'{self.memory}'."
            )
        for line in self.sbatch:
            check_sbatch(line, self.gpus_per_node if self.num_gpus else "", self.memory)
        if self.launcher not in LAUNCHERS:
            raise InputError(f"--launcher: expected {' or '.join(LAUNCHERS)}, not {self.launcher}.")
        if self.conda and self.venv:
            raise InputError("--conda and --venv: activate one environment, not both.")
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                raise InputError(f"--env: '{name}' is no name of an environment variable.")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and "\n" in text:
                    raise InputError(f"{_flag(item.name)}: expected one line, found {text!r}.")

    @property
    def num_gpus(self) -> int:
        """GPUs of a node; a type alone is one of it, as Slurm has it."""
        counts = (part.rpartition(":")[2] for part in self.gpus_per_node.split(","))
        return sum(int(count) if count.isdecimal() else 1 for count in counts)


FIELDS = {item.name: item for item in dataclasses.fields(JobOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each option; those that are not given are absent from the result."""
    for name, item in FIELDS.items():
        kind = {"type": int} if item.type is int else {}
        if item.type in (list, dict):
            kind["action"] = "append"
        parser.add_argument(
            _flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            metavar=item.metadata["metavar"],
            help=item.metadata["help"],
            **kind,
        )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand on the command line, as in a TOML file."""
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    for name, value in given.items():
        if FIELDS[name].type is int and value < 1:
            raise InputError(f"{_flag(name)}: expected 1 or more, found {value}.")
    if "env" in given:
        pairs = [text.partition("=") for text in given["env"]]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise InputError(f"--env {wrong[0]}: expected NAME=VALUE.")
        given["env"] = {name: value for name, _, value in pairs}
    return given


def make_options(*layers: Mapping[str, Any]) -> JobOptions:
    """One job's options: of two layers the later wins; lists add up, variables are merged."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, list):
                value = [*merged.get(name, []), *value]
            elif isinstance(value, dict):
                value = {**merged.get(name, {}), **value}
            merged[name] = value
    return JobOptions(**merged)


def site_file() -> Path:
    """Where a user's site defaults are looked for."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "virtex_d2" / "slurm.toml"


def read_site(path: Path | None) -> dict[str, Any]:
    """The site's defaults: of `path`, or of `site_file()`, which need not exist."""
    if path is None and not site_file().exists():
        return {}
    path = path or site_file()
    return check_table(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Raise InputError if no such file, or not TOML; the message has the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: expected a TOML file: {error}. Strings need quotes.") from error


def check_table(
    table: Mapping[str, Any], where: str, others: Collection[str] = ()
) -> dict[str, Any]:
    """Options out of a TOML table; a number may stand for that of GPUs.

    Args:
        table: keys and values.
        where: its file and place, for messages.
        others: keys that may stand there, too, but that are not options: to name the nearest.
    """
    return {name: _checked(name, value, where, others) for name, value in table.items()}


def _checked(name: str, value: Any, where: str, others: Collection[str]) -> Any:
    if name not in FIELDS:
        raise InputError(f"{where}: unknown key '{name}'.{nearest(name, [*FIELDS, *others])}")
    expected = FIELDS[name].type
    if expected is dict and isinstance(value, dict):
        return {key: _text(f"{name}.{key}", one, where, (str, int)) for key, one in value.items()}
    if expected is list and isinstance(value, list):
        return [_text(name, one, where) for one in value]
    if expected is int and type(value) is int:
        if value < 1:
            raise InputError(f"{where}: {name}: expected 1 or more, found {value}.")
        return value
    if expected is str:
        return _text(name, value, where, (str, int) if name == "gpus_per_node" else (str,))
    kinds = {int: "a whole number", list: "a list of texts", dict: f"a table [{name}]"}
    raise InputError(f"{where}: {name}: expected {kinds[expected]}, found {value!r}.")


def _text(name: str, value: Any, where: str, kinds: Collection[type] = (str,)) -> str:
    if type(value) in kinds:
        return str(value)
    meaning = FIELDS[name].metadata["help"].replace("%%", "%") if name in FIELDS else ""
    raise InputError(
        f"{where}: {name}: expected a text in quotes, found {value!r}"
        f"{f' ({meaning})' if meaning else ''}."
    )


def _flag(name: str) -> str:
    return "--" + (FIELDS[name].metadata["flag"] or name.replace("_", "-"))
