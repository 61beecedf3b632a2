"""Stages that wait for one another, described by a TOML file.

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

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.slurm.options import JobOptions, check_table, make_options, read_toml

_KEYS = ("command", "after")  # of a stage, besides options


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline.

    Attributes:
        name: of the stage, its job and its folder.
        command: the words of its command line.
        options: what it asks of Slurm.
        after: the stages that must have ended well before it starts; all stand before it.
    """

    name: str
    command: tuple[str, ...]
    options: JobOptions
    after: tuple[str, ...]


def read_pipeline(path: Path, site: Mapping[str, Any], given: Mapping[str, Any]) -> list[Stage]:
    """The stages of a file, in its order.

    Args:
        path: the TOML file.
        site: options that hold where the file says nothing.
        given: options of the command line, which hold for every stage whatever the file says.
    """
    content = read_toml(path)
    stages = content.pop("stages", None)
    common = _options(content, str(path), ["stages"])
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{path}: expected stages, each as a table [stages.NAME].")
    read: list[Stage] = []
    for name, table in stages.items():
        where = f"{path}, stage {name}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"{where}: its name becomes a folder's; use letters, digits, - and _.")
        if not isinstance(table, dict):
            raise InputError(f"{where}: expected a table, found {table!r}.")
        own = {key: value for key, value in table.items() if key not in _KEYS}
        own = _options(own, where, _KEYS)
        command = _command(table.get("command"), where)
        after = _after(table.get("after", []), [stage.name for stage in read], where)
        try:
            options = make_options(site, common, {"name": name}, own, given)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        read.append(Stage(name, command, options, after))
    return read


def _options(table: Mapping[str, Any], where: str, others: Collection[str]) -> dict[str, Any]:
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
