"""From which checkpoint a run goes on: its last one, or the last that is whole."""

import logging
import os
from pathlib import Path

from detectron2.utils import comm

from virtex_d2.engine.checksum import damage, has_checksum
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_checkpoint
from virtex_d2.engine.retention import iteration_of, numbered_checkpoints

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"


def has_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether there is something to resume: `last_checkpoint`, or a numbered checkpoint.

    A kill after the first checkpoint and before `last_checkpoint` leaves the one without the other.
    """
    folder = Path(folder)
    return (folder / LAST_CHECKPOINT).is_file() or bool(numbered_checkpoints(folder))


def last_whole_checkpoint(folder: str | os.PathLike, tell: bool = True) -> str:
    """The file that `last_checkpoint` names; where it is damaged or missing, the one before.

    The first process looks, for all of them; to be called in all. Each candidate is read and
    held against its checksum.

    Args:
        folder: OUTPUT_DIR, of which `has_checkpoint` is true.
        tell: whether to log what was found where it is not the last.
    """
    path, problems, refused = "", [], ""
    if comm.is_main_process():
        try:
            path, problems = _find(Path(folder))
        except InputError as error:
            refused = str(error)
    path, problems, refused = comm.all_gather((path, problems, refused))[0]
    if refused:
        raise InputError(refused)
    if problems and tell:
        logger.warning(
            "THE LAST CHECKPOINT CANNOT BE USED: %s.\nThe run goes on from an older one, %s, and "
            "trains what came after it again.",
            "; ".join(problems),
            path,
        )
    return path


def _find(folder: Path) -> tuple[str, list[str]]:
    """The first whole one, and what is wrong with those that would have come before it."""
    candidates, problems = _candidates(folder)
    for path in candidates:
        found = _harm(path)
        if not found:
            return str(path), problems
        problems.append(f"{path}: {found}")
    raise InputError(
        f"OUTPUT_DIR {folder}: there is nothing to resume from: {'; '.join(problems)}. Copy a "
        f"whole checkpoint there and write its name into {LAST_CHECKPOINT}, or begin anew in "
        "another OUTPUT_DIR."
    )


def _harm(path: Path) -> str:
    """Why a file cannot be loaded; "" where it can."""
    if not path.is_file():
        return "there is no such file"
    found = damage(path)
    if not found and not has_checksum(path):  # of stock detectron2: only reading it tells all
        try:
            read_checkpoint(path)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
    return found


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """The last checkpoint and those before it, newest first."""
    older = sorted(numbered_checkpoints(folder).items(), reverse=True)
    try:
        name = (folder / LAST_CHECKPOINT).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return [path for _, path in older], [f"{folder / LAST_CHECKPOINT}: there is no such file"]
    if not name or "\0" in name:
        problem = f"{folder / LAST_CHECKPOINT}: names no file ({name[:80]!r})"
        return [path for _, path in older], [problem]
    last = iteration_of(name)
    # Later ones than the last are of a part of the run that was being repeated.
    return [folder / name, *(path for it, path in older if last is None or it < last)], []
