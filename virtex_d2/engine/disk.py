"""When files cannot be written: which folder, how much room it has, and how much was needed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from virtex_d2.engine.errors import InputError

# No room, over the quota, the file system has become read-only: nothing that is wrong with a file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def free_bytes(folder: str | os.PathLike) -> int:
    """What this user may still write to the file system of a folder."""
    return shutil.disk_usage(folder).free


def in_bytes(size: float) -> str:
    """A size for people: "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def not_written(path: Path, error: OSError, needed: int) -> InputError:
    """The end of a run that cannot write a checkpoint."""
    return InputError(
        f"{path.parent}: {path.name} could not be written: {error.strerror or error}. It takes "
        f"{in_bytes(needed)}{_free_in(path.parent)}. The checkpoints before it are whole, and "
        f"nothing is left of this one. {_WHAT_TO_DO}"
    )


@contextlib.contextmanager
def stop_where_disk_is_full(folder: str | os.PathLike) -> Iterator[None]:
    """Turn a full or read-only file system, whatever file it hits, into an `InputError`.

    Args:
        folder: that the run writes to.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise InputError(
            f"{error.filename or folder}: could not be written: {error.strerror}"
            f"{_free_in(Path(folder))}. The last checkpoint is whole. {_WHAT_TO_DO}"
        ) from error


_WHAT_TO_DO = (
    "Make room (SOLVER.CHECKPOINT_KEEP_LAST keeps fewer checkpoints) or mend the folder, then go "
    "on with --resume."
)


def _free_in(folder: Path) -> str:
    try:
        return f"; {in_bytes(free_bytes(folder))} are free in {folder}"
    except OSError:  # the folder itself is gone
        return ""
