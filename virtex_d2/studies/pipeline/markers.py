"""What a stage leaves behind when it has run: its marker, and what that was made of."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.run import TRACES
from virtex_d2.studies.pipeline.stage import Stage, argv

FOLDER = "stages"  # of the markers, in that of the whole
_SHOWN = 10  # differences that a message names
_NOTHING = "not given"


def marker_path(stage: Stage, output: Path) -> Path:
    """Where the marker of a stage is."""
    return output / FOLDER / f"{stage.name}.json"


def checked_marker(stage: Stage, root: Path, output: Path) -> dict[str, Any]:
    """What an earlier run of the stage has recorded; empty where there was none."""
    path = marker_path(stage, output)
    if not path.is_file():
        return {}
    marker = read_record(path)
    if marker.get("fingerprint") != stage.fingerprint(root):
        folder = root / stage.folder
        trained = any((folder / name).exists() for name in TRACES)
        if not marker.get("complete") and stage.again == "--resume" and not trained:
            # It has left nothing to go on from: after a mistake in the command it begins anew.
            return {}
        told = list(_differences(stage, root, marker))
        more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        raise InputError(
            "\n  ".join(
                [
                    f"{output}: its stage {stage.name} was made by another command, config or "
                    f"input file than now ({path}):",
                    *told[:_SHOWN],
                    *more,
                ]
            )
            + "\nGive all of it as it was before, or choose another --output."
        )
    return marker


def read_record(path: Path) -> dict[str, Any]:
    """A record in JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove the folder.") from error


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record in JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _differences(stage: Stage, root: Path, marker: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was: a line for each option, config key or file."""
    # Markers of older versions have the command alone, as text with the interpreter.
    made_of = marker.get("made_of") or {"command": shlex.split(marker.get("command", ""))[1:]}
    now = stage.made_of(root)
    count = 0
    options = (_options(made_of["command"]), _options(now["command"]))
    for key in _in_both_orders(*options):
        before, after = (side.get(key, _NOTHING) for side in options)
        if before != after:
            count += 1
            yield f"{key}: {before or repr(before)} before, now {after or repr(after)}"
    for part, what in (("configs", "config file"), ("files", "file"), ("needs", "stage")):
        known, found = made_of.get(part), now[part]
        if known is None:
            continue
        for name in (name for name in _in_both_orders(known, found) if name in known):
            if name in found and known[name] != found[name]:
                for line in _changed_inside(known[name], found[name]):
                    count += 1
                    yield f"{what} {name}: {line}"
    if not count:
        suspects = [*now["configs"], *now["files"]] if "made_of" not in marker else []
        if suspects:
            yield f"the content of one of {', '.join(suspects)}"
        else:
            yield f"before: {' '.join(made_of['command'])}"
            yield f"now: {shlex.join(argv(stage, root)[1:])}"


def _changed_inside(before: Any, now: Any) -> Iterator[str]:
    if not isinstance(before, dict):
        yield "its content has changed"
        return
    for key in _in_both_orders(before, now):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key, _NOTHING)} before, now {now.get(key, _NOTHING)}"


def _options(command: list[str]) -> dict[str, str]:
    """A command's KEY VALUE and --flag VALUE pairs; the last of a key counts."""
    _, *words = command
    return dict(zip(words[::2], words[1::2]))


def _in_both_orders(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
