"""What makes a run this run: of all its processes, and before and after a stop."""

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import yaml
from detectron2.utils import comm
from yacs.config import CfgNode

from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.files import read_text

logger = logging.getLogger(__name__)


class RunIdentity:
    """A checkpoint's part that refuses to go on as another run.

    Args:
        parts: names and values, which torch can save; also grouped one deep.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self._parts = dict(parts)

    def state_dict(self) -> dict[str, Any]:
        return self._parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_other_run(_ungrouped(state), _ungrouped(self._parts))


def refuse_other_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError if a part of the identity differs; the message names it."""
    differing = [
        f"{name} was {old}, now it is {new}"
        for name, (old, new) in differences(before, now).items()
    ]
    if differing:
        raise InputError(
            f"--resume: OUTPUT_DIR holds another run: {'; '.join(sorted(differing))}. Resume with "
            "what it began with, or start another one in an OUTPUT_DIR of its own."
        )


def _ungrouped(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for key, part in parts.items()
        for name, value in (part.items() if isinstance(part, Mapping) else [(key, part)])
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts, or a CfgNode, as ("SOLVER.MAX_ITER", value) pairs."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def texts(config: Mapping[str, Any], but: Collection[str] = ()) -> dict[str, str]:
    """`flat` with values as text, without keys that match `but`; lists and tuples are one."""
    return {key: str(_listed(v)) for key, v in flat(config) if not matches(key, but)}


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether a dotted key is one of those that the patterns, such as "TEST.*", name."""
    return any(fnmatch(key, pattern) for pattern in patterns)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values that both give to a key, where they differ: versions may know other keys."""
    return {
        key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]
    }


def check_same(cfg: CfgNode) -> None:
    """Check that all processes have one config. Collective."""
    if comm.get_world_size() == 1:
        return
    mine = texts(cfg)
    hashes = comm.all_gather(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest())
    others = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
    if not others:
        return
    configs = comm.all_gather(mine if comm.get_rank() in (0, others[0]) else {})
    first, other = configs[0], configs[others[0]]
    told = [f"{key} is {b}, not {a}" for key, (a, b) in differences(first, other).items()]
    told += [f"{key} is in one of them only" for key in sorted(first.keys() ^ other.keys())]
    raise InputError(
        f"config: rank {others[0]} has another one than rank 0: {some(told, 10, '; ')}. Give "
        "all processes the same command line, and config files that all machines share."
    )


def check_resumed(cfg: CfgNode, may_change: Collection[str] | None) -> None:
    """Compare a run that goes on with what OUTPUT_DIR/config.yaml says of it, and log what differs.

    Args:
        may_change: patterns of keys that may differ; None: any may.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not os.path.exists(path):
        logger.warning("%s is missing: whether the config has changed is not known.", path)
        return
    try:
        before = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: not YAML: {error}. Remove it, to go on with the config as it is given."
        ) from error
    if not isinstance(before, dict):
        raise InputError(f"{path}: expected the config of the run, found no keys. Remove the file.")
    changed = differences(texts(before), texts(cfg))
    for key, (old, new) in changed.items():
        logger.info("Changed since the run was started: %s was %s, now it is %s", key, old, new)
    refused = {
        key: values
        for key, values in changed.items()
        if may_change is not None and not matches(key, may_change)
    }
    if refused:
        told = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in refused.items())
        raise InputError(
            f"--resume: the run in {cfg.OUTPUT_DIR} was started with another config, and would end "
            f"with other weights than either gives:\n{told}\nResume it with {path}, or start "
            "another run in an OUTPUT_DIR of its own, from the checkpoint with MODEL.WEIGHTS."
        )


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
