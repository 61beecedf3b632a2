"""Files that appear whole or not at all, that are read or refused by name, and full disks.

Needs no torch to be imported, so that small tools start at once.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import uuid
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from virtex_d2.engine.errors import InputError

if TYPE_CHECKING:
    import torch

# Files that are being written. A killed process leaves its one behind; the name tells what it is.
TEMPORARY_PREFIX = ".tmp-"
# Can only be read by setting it, which is for the whole process: once, before there are threads.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_path(dest: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that `dest` is either the old file or the whole new one, also after a kill.

    Yields a path in the folder of `dest` (created where absent), with the same suffix, for the body
    to create. When the body succeeds, the file is flushed to disk and renamed to `dest`; when it
    fails, the file is removed.

    Raises:
        FileNotFoundError: the body did not create the file.
    """
    dest = Path(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    temporary = dest.with_name(f"{TEMPORARY_PREFIX}{dest.stem}-{token}{dest.suffix}")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write for their user alone
        _fsync(temporary)
        os.replace(temporary, dest)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(dest.parent)  # the rename itself


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON to be read by people, too, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading


def require_file(path: str | os.PathLike) -> None:
    """Refuse a path where there is no file, or a folder."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "nothing"
        raise InputError(f"{path}: expected a file, found {found} there. Check the path.")


def read_text(path: str | os.PathLike) -> str:
    """Read a text file in UTF-8, with or without a byte order mark; line ends stay as they are."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}. Check the path.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content and not content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise InputError(
                f"{path}: expected text in UTF-8, found a binary file. Is it the right one?"
            ) from error
        line = error.object.count(b"\n", 0, error.start) + 1
        nearby = error.object[max(0, error.start - 30) : error.start + 10]
        raise InputError(
            f"{path}, line {line}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}"
            f" in {nearby!r}. Save it as UTF-8, for example with iconv."
        ) from error


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """Read JSON whose top is an object (`kind` dict) or a list."""
    try:
        content = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected JSON, but it is cut short or not JSON ({error}). Copy it again."
        ) from error
    if not isinstance(content, kind):
        expected = {dict: "a JSON object", list: "a JSON list"}[kind]
        raise InputError(f"{path}: expected {expected}, found a {type(content).__name__}.")
    return content


def json_lines(path: str | os.PathLike) -> list[dict]:
    """Read the objects of JSON lines; half a line, of a run that was killed, counts for none.

    Raises:
        OSError: the file cannot be read.
    """
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_safetensors(
    path: str | os.PathLike, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> None:
    """Write named tensors (any shape and device) and string metadata, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata))


def read_safetensors(path: str | os.PathLike) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Read a safetensors file: tensors on the CPU by name, and the metadata ({} where none)."""
    from safetensors import safe_open

    require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise InputError(
            f"{path}: expected a whole safetensors file, but it is truncated, damaged or of "
            f"another format ({error}). Copy or export it again."
        ) from error


# --- checkpoints that know their own SHA-256
#
# torch's format is a zip archive with a CRC-32 of every record, which `torch.load` does not look
# at, and no CRC covers the archive's directory, where a flipped byte can exchange two tensors. So
# the whole file's SHA-256 stands in the archive's comment, at its end: it cannot be parted from the
# file, appears with it in one rename, and whatever reads zip archives passes over it. It guards
# against accidents, not against forgery.

_MARK = b"virtex_d2 sha256="
_COMMENT_SIZE = len(_MARK) + 64  # the digest in hexadecimal
# The last field of an archive is the comment's length; torch writes 0.
_LENGTH = struct.Struct("<H")


class _HashingFile:
    """What `torch.save` writes to: hashes on the way, and remembers why a write failed."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def save_with_checksum(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """`torch.save(state, path)`, with the SHA-256 of all that it writes in the archive's comment.

    Raises:
        OSError: of the file system, as it is (torch alone would turn it into a RuntimeError).
    """
    import torch

    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)
        except Exception:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.seek(-_LENGTH.size, os.SEEK_END)
        file.write(_LENGTH.pack(_COMMENT_SIZE))
        file.write(_MARK + hashing.digest.hexdigest().encode())


def checksum_damage(path: str | os.PathLike) -> str | None:
    """What a checkpoint's own SHA-256 says is wrong with it, as a clause for a message.

    Returns:
        "" where it is what was written, None where the file has no checksum.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            left = size - _COMMENT_SIZE - _LENGTH.size
            file.seek(max(left, 0))
            start, written = _LENGTH.pack(_COMMENT_SIZE) + _MARK, file.read()
            if left < 0 or not written.startswith(start):
                return None if size else "it is empty"
            file.seek(0)
            while block := file.read(min(1 << 20, left)):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    digest.update(_LENGTH.pack(0))
    is_whole = written.removeprefix(start) == digest.hexdigest().encode()
    return "" if is_whole else "its content is not what was written (SHA-256)"


# --- when files cannot be written: which folder, how much room it has, and how much was needed

# No room, over the quota, the file system has become read-only: nothing that is wrong with a file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_WHAT_TO_DO = (
    "Make room (SOLVER.CHECKPOINT_KEEP_LAST keeps fewer checkpoints) or mend the folder, then go "
    "on with --resume."
)


def in_bytes(size: float) -> str:
    """A size for people: "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def not_written(path: Path, error: OSError, needed: int) -> InputError:
    """The end of a run that cannot write a checkpoint, of `needed` bytes."""
    return InputError(
        f"{path.parent}: {path.name} could not be written: {error.strerror or error}. It takes "
        f"{in_bytes(needed)}{_free_in(path.parent)}. The checkpoints before it are whole, and "
        f"nothing is left of this one. {_WHAT_TO_DO}"
    )


@contextlib.contextmanager
def stop_where_disk_is_full(folder: str | os.PathLike) -> Iterator[None]:
    """Turn a full or read-only file system, whatever file it hits, into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise InputError(
            f"{error.filename or folder}: could not be written: {error.strerror}"
            f"{_free_in(Path(folder))}. The last checkpoint is whole. {_WHAT_TO_DO}"
        ) from error


def _free_in(folder: Path) -> str:
    try:
        return f"; {in_bytes(shutil.disk_usage(folder).free)} are free in {folder}"
    except OSError:  # the folder itself is gone
        return ""
