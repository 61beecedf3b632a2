"""Configs from YAML files and the command line: safe, and with errors that name file and key."""

import functools
import operator
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from yacs.config import CfgNode

from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError, nearest

_LISTED = 5  # problems of one file that are named


def load_config(
    cfg: CfgNode,
    config_file: str | None,
    opts: Sequence[str] | None,
    opts_from: str = "command line",
    expand: bool = True,
) -> CfgNode:
    """Merge a YAML file (with the files it names in `_BASE_`) and KEY VALUE pairs into `cfg`.

    YAML tags that build Python objects are refused (detectron2's own loader allows them). An int
    is accepted for a float; a value for a string key stays text, so `OUTPUT_DIR 2024` works. In
    every text a leading ~ and variables are replaced, except in commands ("pipe:...").

    Args:
        cfg: every valid key with its default. Changed only when all is valid; returned thawed.
        config_file: path of a YAML file; None or "" for none.
        opts: ["KEY", "VALUE", ...] from the command line, applied last.
        opts_from: where they stand, for messages: a flag's name.
        expand: False where the config is only looked at, and used on another machine.
    """
    cfg.defrost()
    result = cfg.clone()
    for path, content in _files(config_file) if config_file else ():
        if problems := list(_merge_mapping(result, result, content, prefix="")):
            raise InputError(f"{path}: " + _listed(problems))
    _merge_opts(result, list(opts or []), opts_from)
    if expand:
        _expand(result, prefix="")
    # Replaced and not merged: yacs would evaluate the strings once more, and 2024 become a number.
    cfg.clear()
    cfg.update(result)
    return cfg


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file with the files that it names in `_BASE_`, as nested dicts."""

    def merge(target: dict, content: dict) -> None:
        for key, value in content.items():
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                merge(target[key], value)
            else:
                target[key] = value

    merged: dict[str, Any] = {}
    for _, content in _files(os.fspath(path)):
        merge(merged, content)
    return merged


def _files(path: str, including: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and content of the files that a file names in `_BASE_`, then its own."""
    path = expanded(path, "--config-file")
    if os.path.realpath(path) in including:
        raise InputError(f"{path}: includes itself through {BASE_KEY}. Remove one of the two.")
    content = _read_yaml(path, including)
    bases = content.pop(BASE_KEY, [])
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.join(os.path.dirname(path), expanded(base, f"{path}: {BASE_KEY}"))
        yield from _files(base, (*including, os.path.realpath(path)))
    yield path, content


def _expand(value: Any, prefix: str) -> Any:
    """A value with its texts `expanded`; of a config itself in place."""
    if isinstance(value, CfgNode):
        for key, one in value.items():
            value[key] = _expand(one, f"{prefix}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        return type(value)(_expand(one, prefix) for one in value)
    elif isinstance(value, str) and not value.startswith("pipe:"):
        return expanded(value, prefix)
    return value


def _read_yaml(path: str, including: tuple[str, ...]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except yaml.constructor.ConstructorError as error:
        raise InputError(
            f"{path}: {error.problem} (line {error.problem_mark.line + 1}). Tags that build Python "
            "objects are refused; write plain values."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        whence = f" (named by {BASE_KEY} in {including[-1]})" if including else ""
        raise InputError(
            f"{path}: cannot read this config file{whence}: {error.strerror}. Check the path."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected KEY: VALUE lines, found a {type(content).__name__}")
    return content


def _merge_mapping(root: CfgNode, node: CfgNode, content: dict, prefix: str) -> Iterator[str]:
    """Merge into `node`, the part of `root` at `prefix`; yields what is wrong with the content."""
    for key, value in content.items():
        full_key = f"{prefix}{key}"
        if key in node and isinstance(node[key], CfgNode):
            if isinstance(value, dict):
                yield from _merge_mapping(root, node[key], value, prefix=f"{full_key}.")
            else:
                yield f"{full_key} is a group of keys; found {_described(value)}"
        elif key not in node and node.is_new_allowed():
            group = isinstance(value, dict)
            node[key] = type(node)(value, new_allowed=True) if group else value
        else:
            yield from _set(root, full_key, value)


def _merge_opts(cfg: CfgNode, opts: list[str], where: str) -> None:
    flags = [opt for opt in opts[::2] if opt.startswith("-")]
    if flags:
        raise InputError(
            f"{where}: {flags[0]} stands where a config key was expected. "
            "Unknown flag, or a flag between the KEY VALUE pairs?"
        )
    if len(opts) % 2:
        raise InputError(
            f"{where}: the key {opts[-1]} has no value (overrides are KEY VALUE pairs)."
            + ("" if opts[-1] in set(_keys(cfg)) else " Is a value before it missing?")
        )
    problems = []
    for key, value in zip(opts[::2], opts[1::2]):
        problems.extend(_set(cfg, key, value))
    if problems:
        raise InputError(f"{where}: " + _listed(problems))


def _listed(problems: list[str]) -> str:
    if len(problems) <= _LISTED:
        return "\n  ".join(problems)
    more = f"and {len(problems) - _LISTED} more: is this the config of another tool?"
    return "\n  ".join([*problems[:_LISTED], more])


def _set(cfg: CfgNode, full_key: str, value: Any) -> Iterator[str]:
    """Set one key; yields what is wrong where that cannot be done."""
    if cfg.key_is_deprecated(full_key):
        return
    parent, _, name = full_key.rpartition(".")
    node = _get(cfg, parent) if parent else cfg
    if not isinstance(node, CfgNode) or name not in node:
        if isinstance(node, CfgNode) and node.is_new_allowed():
            node[name] = cfg._decode_cfg_value(value)
            return
        yield f"unknown key {full_key}.{nearest(full_key, _keys(cfg))}"
        return
    old = node[name]
    decoded = cfg._decode_cfg_value(value)
    if isinstance(old, float) and type(decoded) is int:
        decoded = float(decoded)
    elif isinstance(old, str) and isinstance(value, str) and decoded is not None:
        decoded = decoded if isinstance(decoded, str) else value
    try:
        # Through a list of one pair, for yacs's own rules of which types go together. Its strings
        # are evaluated again there, hence the quotes.
        quoted = repr(decoded) if isinstance(decoded, str) else decoded
        cfg.merge_from_list([full_key, quoted])
    except (ValueError, AssertionError, KeyError):
        yield (
            f"{full_key} expects {_kind(old)} such as {old!r}; found {_described(decoded)}."
            + _how_to_write(old, decoded)
        )


def _how_to_write(old: Any, found: Any) -> str:
    if not (isinstance(old, (tuple, list)) and isinstance(found, str)):
        return ""
    names = [name.strip() for name in found.strip("()[] ").split(",") if name.strip()]
    if not names or any(re.search(r"[\s'\"()\[\]]", name) for name in names):
        return ""
    quoted = ", ".join(f"'{name}'" for name in names)
    return f' Write "({quoted}{"," if len(names) == 1 else ""})".'


def _get(cfg: CfgNode, dotted: str) -> Any:
    node: Any = cfg
    for name in dotted.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            return None
        node = node[name]
    return node


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _kind(value: Any) -> str:
    return "a group of keys" if isinstance(value, CfgNode) else f"a {type(value).__name__}"


def _described(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def get_key(cfg: CfgNode, dotted: str) -> Any:
    """The value of a key, as "SOLVER.MAX_ITER"."""
    return functools.reduce(operator.getitem, dotted.split("."), cfg)


def set_key(cfg: CfgNode, dotted: str, value: object) -> None:
    """Set the value of a key, of a config that is not frozen."""
    group, _, key = dotted.rpartition(".")
    get_key(cfg, group)[key] = value
