"""What jobs ask of Slurm, from a site's file, a pipeline's and the command line.

A pipeline's file has stages that wait for one another:

nodes = 2                                    # for every stage: options of tools/launch_slurm.py
gpus_per_node = 8

[stages.pretrain]
time = "48:00:00"                            # for this stage
command = "tools/pretrain_net.py --config-file ... OUTPUT_DIR output/pretrain"

[stages.finetune]
after = ["pretrain"]                         # starts when these have ended well
array = "1-3"
command = \"\"\"
    tools/train_net.py --config-file ... SEED {array}
    MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/finetune{array}\"\"\"
"""

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOGS = "output/slurm"
LAUNCHERS = ("srun", "torchrun")
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|-1|UNLIMITED|INFINITE", re.IGNORECASE)
_TYPE = r"[^\s,:=]+"  # as in any gres.conf
_GPUS = re.compile(rf"({_TYPE}:\d+|\d+|{_TYPE})(,({_TYPE}:\d+|\d+|{_TYPE}))*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_SAME = "nodes cpus-per-task time partition account qos constraint array dependency gpus-per-node"
# Options of sbatch that the script sets, with the tool's for each; "": it has none.
_TAKEN = {name: name for name in _SAME.split()} | {
    "job-name": "name",
    "mem": "memory",
    "output": "logs",
    "signal": "stop-before",
    "ntasks": "tasks-per-node",
    "ntasks-per-node": "tasks-per-node",
    "chdir": "",
    "open-mode": "",
    "kill-on-invalid-dep": "",
}
_LONG = ("account", "constraint", "chdir", "gpus", "job-name", "nodes", "array", "cpus-per-task")
_LONG += ("dependency", "ntasks", "output", "partition", "qos", "time")
_SHORT = dict(zip("ACDGJNacdnopqt", _LONG))
_STAGE_KEYS = ("command", "after")  # of a stage, besides options


def _about(default: Any, metavar: str, text: str, flag: str = "") -> dict[str, Any]:
    """A field's default, and what --help says of it; `flag` where it is not the field's name."""
    of_its_own = isinstance(default, (list, dict))
    given = {"default_factory": type(default)} if of_its_own else {"default": default}
    return {**given, "metadata": {"help": text, "metavar": metavar, "flag": flag}}


@dataclass(frozen=True)
class JobOptions:
    """A job's options; each is a key of TOML files and, with dashes, a flag of the tool."""

    name: str = field(**_about("", "NAME", "of the job (default: of the tool, or of the stage)"))
    nodes: int = field(**_about(1, "N", "number of nodes"))
    gpus_per_node: str = field(**_about("", "N", "0 for CPUs alone; 8 or TYPE:8"))
    tasks_per_node: int = field(**_about(0, "N", "processes (default: one a GPU, else one)"))
    cpus_per_task: int = field(**_about(0, "N", "of a process and its loader workers"))
    memory: str = field(**_about("", "SIZE", "per node, e.g. 64G; 0 for all of it"))
    time: str = field(**_about("", "LIMIT", "limit of each start, e.g. 24:00:00 or 2-00:00:00"))
    partition: str = field(**_about("", "NAME", "partition, or several with commas"))
    account: str = field(**_about("", "NAME", "whom to charge"))
    qos: str = field(**_about("", "NAME", "quality of service"))
    constraint: str = field(**_about("", "FEATURES", "features of nodes, e.g. a100"))
    array: str = field(
        **_about("", "SPEC", "one job for each number, e.g. 0-17%%4; {array} in the command")
    )
    dependency: str = field(**_about("", "SPEC", "Slurm's, e.g. afterok:1234"))
    modules: list = field(**_about([], "NAME", "to load; repeat it", flag="module"))
    conda: str = field(**_about("", "ENV", "environment to activate"))
    venv: str = field(**_about("", "DIR", "folder of a virtual environment to activate"))
    setup: list = field(**_about([], "LINE", "a line of shell before the run; repeat it"))
    container: str = field(
        **_about("", "COMMAND", "goes before python: 'apptainer exec --nv image.sif'")
    )
    python: str = field(
        **_about("", "FILE", "default: this one, or python in conda, venv, container")
    )
    env: dict = field(**_about({}, "NAME=VALUE", "environment of the run; repeat it"))
    launcher: str = field(
        **_about("srun", "NAME", "srun starts every process, or torchrun on every node")
    )
    srun: list = field(
        **_about([], "OPTION", "another option of srun, without its dashes; repeat it")
    )
    sbatch: list = field(**_about([], "OPTION", "another #SBATCH line, without dashes; repeat it"))
    logs: str = field(**_about(LOGS, "DIR", "folder for scripts and logs, seen by all nodes"))
    stop_before: int = field(
        **_about(120, "SECONDS", "seconds before the time limit at which to stop")
    )
    max_stuck: int = field(**_about(2, "N", "restarts in a row without progress, then no more"))

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
        limit = _seconds(self.time)
        if limit and self.stop_before >= limit:
            raise InputError(
                f"--stop-before {self.stop_before}: the time limit {self.time} is {limit} seconds, "
                "so that the run would be asked to stop when it begins. Raise --time (24 are "
                "minutes, 24:00:00 hours), or lower --stop-before."
            )
        if self.array:
            array_numbers(self.array)
        for line in self.sbatch:
            self._check_sbatch(line)
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

    def _check_sbatch(self, line: str) -> None:
        """Refuse a line of --sbatch that would take the place of what the script asks for."""
        # "time=5", "--time 5", "-t 5" and "-t5"
        short = re.match(r"-([A-Za-z])(.*)", line.strip())
        name, value = (short or re.match(r"(?:--)?([^=\s]*)(.*)", line.strip())).groups()
        name = _SHORT.get(name, name) if short else name
        if name in _TAKEN:
            own = f"use --{_TAKEN[name]}" if _TAKEN[name] else "leave it out"
            raise InputError(f"--sbatch {line}: the script asks for it already; {own}.")
        of_gpus = name in ("gpus", "gpus-per-task", "ntasks-per-gpu")
        if self.num_gpus and (of_gpus or (name == "gres" and "gpu" in value)):
            raise InputError(
                f"--sbatch {line}: contradicts --gpus-per-node {self.gpus_per_node}. Where the "
                "site wants it so, say --gpus-per-node 0, and how many --tasks-per-node."
            )
        if self.memory and name in ("mem-per-cpu", "mem-per-gpu"):
            raise InputError(
                f"--sbatch {line}: contradicts --memory {self.memory}; give one of the two."
            )


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
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: expected a TOML file: {error}. Strings need quotes.") from error


def check_table(
    table: Mapping[str, Any], where: str, others: Collection[str] = ()
) -> dict[str, Any]:
    """Options out of a TOML table; a number may stand for that of GPUs.

    Args:
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


def _seconds(limit: str) -> int:
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


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline."""

    name: str  # of the stage, its job and its folder
    command: tuple[str, ...]  # the words of its command line
    options: JobOptions  # what it asks of Slurm
    # the stages that must have ended well before it starts; all stand before it
    after: tuple[str, ...]


def read_pipeline(path: Path, site: Mapping[str, Any], given: Mapping[str, Any]) -> list[Stage]:
    """The stages of a file, in its order.

    Args:
        site: options that hold where the file says nothing.
        given: options of the command line, which hold for every stage whatever the file says.
    """
    content = read_toml(path)
    stages = content.pop("stages", None)
    common = _stage_options(content, str(path), ["stages"])
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{path}: expected stages, each as a table [stages.NAME].")
    read: list[Stage] = []
    for name, table in stages.items():
        where = f"{path}, stage {name}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"{where}: its name becomes a folder's; use letters, digits, - and _.")
        if not isinstance(table, dict):
            raise InputError(f"{where}: expected a table, found {table!r}.")
        own = {key: value for key, value in table.items() if key not in _STAGE_KEYS}
        own = _stage_options(own, where, _STAGE_KEYS)
        command = _command(table.get("command"), where)
        after = _after(table.get("after", []), [stage.name for stage in read], where)
        try:
            options = make_options(site, common, {"name": name}, own, given)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        read.append(Stage(name, command, options, after))
    return read


def _stage_options(table: Mapping[str, Any], where: str, others: Collection[str]) -> dict[str, Any]:
    if "logs" in table:
        raise InputError(f"{where}: logs: one folder holds all stages; give it as --logs.")
    return check_table(table, where, others)


def _command(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: command: expected a command line, found {value!r}.")
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise InputError(f"{where}: command: {error}: {value.strip()}") from error


def _after(value: Any, earlier: list[str], where: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise InputError(f"{where}: after: expected names of stages, found {value!r}.")
    for name in names:
        if name not in earlier:
            raise InputError(
                f"{where}: after: no stage '{name}' stands before it.{nearest(str(name), earlier)}"
            )
    return tuple(names)
