"""Files that appear whole or not at all. Needs no torch, so that small tools start at once."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from virtex_d2.engine.errors import InputError

# Files that are being written. A killed process leaves its one behind; the name tells what it is.
TEMPORARY_PREFIX = ".tmp-"


# Can only be read by setting it, which is for the whole process: once, before there are threads.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_path(dest: str | os.PathLike, overwrite: bool = True) -> Iterator[Path]:
    """Write a file so that `dest` is either the old file or the whole new one, also after a kill.

    Yields a path in the folder of `dest` (created where absent), with the same suffix, for the body
    to create. When the body succeeds, the file is flushed to disk and renamed to `dest`; when it
    fails, the file is removed.

    Raises:
        FileNotFoundError: the body did not create the file.
    """
    dest = Path(dest)
    _refuse_existing(dest, overwrite)
    dest.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    temporary = dest.with_name(f"{TEMPORARY_PREFIX}{dest.stem}-{token}{dest.suffix}")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write for their user alone
        _fsync(temporary)
        _refuse_existing(dest, overwrite)
        os.replace(temporary, dest)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(dest.parent)  # the rename itself


def _refuse_existing(dest: Path, overwrite: bool) -> None:
    if not overwrite and dest.exists():
        raise InputError(f"{dest}: exists already. Choose another name, or remove it first.")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
