"""Checkpoints that know their own SHA-256, and what is wrong with a file that should be one.

torch's format is a zip archive with a CRC-32 of every record, which `torch.load` does not look at:
it loads a file with a flipped byte in a tensor, and trains on. And no CRC covers the archive's
directory, where a flipped byte can exchange two tensors. So the whole file's SHA-256 stands in the
archive's comment, at its end: it cannot be parted from the file, appears with it in one rename, and
everything that reads zip archives or torch's format (detectron2's checkpointer, `unzip -t`) passes
over it. It is a guard against accidents, not against forgery.
"""

import hashlib
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

_MARK = b"virtex_d2 sha256="
_COMMENT_SIZE = len(_MARK) + 64  # the digest in hexadecimal
# The last field of an archive is the comment's length; torch writes 0.
_LENGTH = struct.Struct("<H")
_BLOCK = 1 << 20


def save_with_checksum(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """`torch.save(state, path)`, with the SHA-256 of all that it writes in the archive's comment.

    Raises:
        OSError: of the file system, as it is (torch alone would turn it into a RuntimeError).
    """
    with open(path, "wb") as file:
        sink = _HashingSink(file)
        try:
            torch.save(state, sink)
        except Exception:
            if sink.error is not None:
                raise sink.error from None
            raise
        file.seek(-_LENGTH.size, os.SEEK_END)
        file.write(_LENGTH.pack(_COMMENT_SIZE))
        file.write(_MARK + sink.digest.hexdigest().encode())


def damage(path: str | os.PathLike) -> str:
    """What is wrong with a checkpoint's bytes, as a clause for a message; "" where nothing is.

    A file of this project is held against its SHA-256, another archive of torch's against the
    CRC-32 of its records; before torch 1.6 there were no checksums, so that nothing is found.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "it is empty"
            expected = _written_digest(file, size)
            if expected:
                found = _digest_without_comment(file, size)
                return "" if found == expected else "its content is not what was written (SHA-256)"
            file.seek(0)
            if file.read(4) != b"PK\x03\x04":
                return ""
            return _archive_damage(file)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


def has_checksum(path: str | os.PathLike) -> bool:
    """Whether a file's own SHA-256 is in it."""
    with open(path, "rb") as file:
        return bool(_written_digest(file, file.seek(0, os.SEEK_END)))


class _HashingSink:
    """What `torch.save` writes to: hashes on the way, and remembers why a write failed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise


def _written_digest(file: BinaryIO, size: int) -> str:
    """The digest in the comment; "" where there is none."""
    start = size - _COMMENT_SIZE - _LENGTH.size
    if start < 0:
        return ""
    file.seek(start)
    tail = file.read()
    comment = tail[_LENGTH.size :]
    if not comment.startswith(_MARK) or tail[: _LENGTH.size] != _LENGTH.pack(_COMMENT_SIZE):
        return ""
    return comment[len(_MARK) :].decode("latin-1")


def _digest_without_comment(file: BinaryIO, size: int) -> str:
    """The SHA-256 of what torch had written."""
    digest = hashlib.sha256()
    left = size - _COMMENT_SIZE - _LENGTH.size
    file.seek(0)
    while left:
        block = file.read(min(_BLOCK, left))
        digest.update(block)
        left -= len(block)
    digest.update(_LENGTH.pack(0))
    return digest.hexdigest()


def _archive_damage(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
    except (OSError, MemoryError):  # which say nothing about the file
        raise
    except Exception as error:  # what zipfile makes of damaged headers: encrypted, other method ...
        return f"it is cut short, or its directory of records is damaged ({error})"
    return f"its record {record} fails its checksum" if record else ""
