"""A stage: one command of a longer line of work, done once."""

import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import sha256
from virtex_d2.engine.identity import texts


@dataclass(frozen=True)
class Stage:
    """One command of the line.

    Attributes:
        name: a file name for its marker and log, e.g. "seed1-pretrain".
        title: one line for people.
        command: arguments after the interpreter, relative to the project's root.
        folder: what it writes into, relative to the root or absolute.
        configs: config files that it reads, relative to the root.
        needs: the stages whose output it reads.
        files: files of others that it reads, such as weights: another content is another stage.
        iterations: how many it will report; 0 where it does not train.
        again: the flag with which the tool goes on from, or replaces, what a stopped run has left.
        label: a word for the progress line.
        group: neighbours of the same group run at the same time; "" for a stage on its own.
    """

    name: str
    title: str
    command: tuple[str, ...]
    folder: str
    configs: tuple[str, ...] = ()
    needs: tuple["Stage", ...] = field(default=(), repr=False)
    files: tuple[str, ...] = ()
    iterations: int = 0
    again: str = "--resume"
    label: str = ""
    group: str = ""

    def made_of(self, root: Path) -> dict[str, Any]:
        """What `fingerprint` is of, so that what has changed can be named.

        Returns:
            "command", words; by name "configs", {key: text} each; "files", their SHA-256; "needs",
            fingerprints.
        """
        return {
            "command": list(self.command),
            "configs": {config: texts(read_config(root / config)) for config in self.configs},
            "files": {file: _content_hash(root / file) for file in self.files},
            "needs": {stage.name: stage.fingerprint(root) for stage in self.needs},
        }

    def fingerprint(self, root: Path) -> str:
        """A hash of the command, its config files (with those they include), and its inputs."""
        digest = hashlib.sha256(json.dumps(self.command).encode())
        for config in self.configs:
            digest.update(json.dumps(read_config(root / config), sort_keys=True).encode())
        for file in self.files:
            digest.update(_content_hash(root / file).encode())
        for stage in self.needs:
            digest.update(stage.fingerprint(root).encode())
        return digest.hexdigest()


def grouped(stages: Iterable[Stage]) -> list[list[Stage]]:
    """The stages in order, those neighbours together that have the same group."""
    by_group = itertools.groupby(stages, key=lambda stage: stage.group or stage.name)
    return [list(members) for _, members in by_group]


def argv(stage: Stage, root: Path, again: bool = False) -> list[str]:
    """What to execute in the project's root, the interpreter first."""
    script, *arguments = stage.command
    return [_interpreter(root), script, *([stage.again] if again else []), *arguments]


def _interpreter(root: Path) -> str:
    # As people type it: .venv/bin/python and not its absolute path.
    relative = os.path.relpath(sys.executable, root)
    return sys.executable if relative.startswith("..") else relative


def read_config(path: Path) -> dict[str, Any]:
    """A YAML config with what it includes by `_BASE_`, as nested dicts."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(
            f"{path}: cannot read this config file: {error.strerror}. Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected KEY: VALUE lines, found a {type(content).__name__}")
    bases = content.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merged(merged, read_config(path.parent / base))
    return _merged(merged, content)


def _content_hash(path: Path) -> str:
    try:
        status = path.stat()
        return _hash_of_version(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot read this file: {error.strerror}.") from error


@functools.lru_cache(maxsize=1024)
def _hash_of_version(path: Path, modified: int, size: int) -> str:
    """One reading of a file for all stages that need it."""
    del modified, size  # of the cache's key
    return sha256(path)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **both}
