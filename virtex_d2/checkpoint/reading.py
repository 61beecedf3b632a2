"""Tensors out of any checkpoint file, whoever wrote it, without running what is in the file.

The format is found from the content: safetensors, torch.save's zip archive, torch.save's old
format, or a plain pickle of numpy arrays (detectron2's and Caffe2's model zoos). Pickles are
interpreted by `unpickling`, which calls nothing, and the tensors that they describe are made by
`building`, which compares every number with the bytes that are there.
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from virtex_d2.checkpoint.building import MAX_AXES, Builder, Extent, read_extent
from virtex_d2.checkpoint.rebuilding import (
    LEGACY_MAGIC,
    READ,
    READABLE_DTYPES,
    persistent_storage,
    read_legacy,
    unpickle,
)
from virtex_d2.checkpoint.stored import BoundedFile, Budget, Damaged, Placeholder, Refused
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import require_file

_MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's directory: some 150 000 storages
_SAVE_ALONE = (
    "Save the state dict alone, where it was trained: "
    "torch.save({'model': model.state_dict()}, path)."
)


@dataclass(frozen=True)
class StoredCheckpoint:
    """What is in a checkpoint file.

    Attributes:
        path: of the file.
        format: "torch zip", "torch legacy", "safetensors" or "pickle".
        content: dicts, lists, tuples, sets and scalars, as they are nested in the file (each value
            with a copy of its own, where the file refers to one value twice), and as leaves CPU
            tensors of any shape, contiguous, each in its own memory, without gradient, in the dtype
            of the file: bool, (u)int8 to (u)int64, float16, bfloat16, float32, float64, complex64
            or complex128. Arrays of numpy are tensors too, its scalars Python's. A dtype or device
            is its name. A `Placeholder` stands where an object of another class was.
        metadata: strings by name, of safetensors files; {} for others.
        foreign: the names of the classes and functions whose results were replaced, sorted.
    """

    path: str
    format: str
    content: Any
    metadata: dict[str, str]
    foreign: tuple[str, ...]


def read_tensors(path: str | os.PathLike) -> StoredCheckpoint:
    """Read the tensors of a checkpoint file, and the plain values among them.

    Nothing in the file can run code, or take time or memory out of proportion to its size.
    """
    path = os.fsdecode(path)
    require_file(path)
    kind = "checkpoint"
    try:
        with open(path, "rb") as file:
            kind, read = _format(file)
            content, metadata, foreign = read(file)
    except Refused as refusal:
        raise InputError(f"{path}: refused: {refusal}.") from None
    except Damaged as damage:
        raise InputError(_damage_message(path, kind, damage)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except MemoryError:
        raise
    except Exception as error:  # of zipfile, numpy or torch, which cannot make sense of the bytes
        raise InputError(_damage_message(path, kind, error)) from error
    if isinstance(content, Placeholder):
        raise InputError(
            f"{path}: expected tensors by name, found one object of {content.name}, which only its "
            f"own code can open, and code from a file is not run. {_SAVE_ALONE}"
        )
    if not _has_tensor(content):
        inside = f", outside of objects of other classes ({_some(foreign)})" if foreign else ""
        raise InputError(f"{path}: expected tensors, found none{inside}. {_SAVE_ALONE}")
    return StoredCheckpoint(path, kind, content, metadata, tuple(sorted(foreign)))


def _damage_message(path: str, kind: str, reason: Exception) -> str:
    text = " ".join(str(reason).split())[:300] or type(reason).__name__
    return (
        f"{path}: expected a whole {kind} file, but it is damaged or cut short "
        f"({ascii(text)[1:-1]}). Copy or download it again."
    )


def _some(names: set[str], shown: int = 5) -> str:
    first = ", ".join(sorted(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_tensor, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)


# --- formats

_Read = Callable[[BinaryIO], tuple[Any, dict[str, str], set[str]]]
# What else people have under a checkpoint's name: the first bytes, what it is, and what to do.
_OTHER_FILES = (
    (b"version https://git-lfs", "a pointer of Git LFS", "Fetch the file with `git lfs pull`"),
    (b"<", "a web page or XML", "The download failed: try the address in a browser"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"BZh", "a bzip2 archive", "Unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first"),
    (b"\x93NUMPY", "a single numpy array", "Pickle a dict of arrays by name"),
    (b"\x89HDF", "an HDF5 file", "Convert it to safetensors with the library that wrote it"),
    (b"GGUF", "a GGUF file", "Convert it to safetensors with the library that wrote it"),
)


def _format(file: BinaryIO) -> tuple[str, _Read]:
    """Name and reader of the format that a file's first bytes are of."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    file.seek(0)
    if not head:
        raise Refused("it is empty. Copy or download it again")
    for start, found, advice in _OTHER_FILES:
        if head.startswith(start):
            raise Refused(f"it is {found}, no checkpoint. {advice}")
    if head[257:262] == b"ustar":
        raise Refused(
            "it is a tar archive, as torch.save wrote before 2017. Load it with an old version of "
            "torch, and save it again"
        )
    if head.startswith(b"PK\x03\x04"):
        return "torch zip", _read_zip
    # The length of a header, of at most 4 GiB, and the header's first character.
    if head[4:9] == b"\0\0\0\0{":
        if int.from_bytes(head[:8], "little") > size - 8:
            raise Damaged("the header of safetensors would be longer than the file")
        return "safetensors", _read_safetensors
    if head[:1] == b"\x80" or head[:1] in b"(]}c":
        budget, foreign = Budget(size), set()
        bounded = BoundedFile(file, size)
        value = unpickle(bounded, budget, foreign)
        if value == LEGACY_MAGIC:
            return "torch legacy", lambda file: _read_legacy(file, bounded, budget)
        return "pickle", lambda file: _read_pickle(file, value, budget, foreign)
    raise Refused(
        f"it starts with {head[:8]!r}, and is no format that is known here: torch.save's, "
        "safetensors, or a pickle of numpy arrays. Check the path"
    )


def _read_pickle(
    file: BinaryIO, value: Any, budget: Budget, foreign: set[str]
) -> tuple[Any, dict[str, str], set[str]]:
    return Builder(file, budget, foreign, {}).build(value), {}, foreign


def _read_legacy(
    file: BinaryIO, bounded: BoundedFile, budget: Budget
) -> tuple[Any, dict[str, str], set[str]]:
    foreign: set[str] = set()
    value, found = read_legacy(bounded, budget, foreign)
    storages = {key: Extent(*extent) for key, extent in found.items()}
    return Builder(file, budget, foreign, storages).build(value), {}, foreign


def _read_safetensors(file: BinaryIO) -> tuple[Any, dict[str, str], set[str]]:
    try:
        with safe_open(file.name, framework="pt", device="cpu") as archive:
            # Copies: what the library returns may be pages of the file, and change with it.
            tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118
            metadata = dict(archive.metadata() or {})
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise Damaged(str(error)) from error
    for name, tensor in tensors.items():
        if tensor.dim() > MAX_AXES:
            raise Refused(
                f"{name!a} is a tensor of {tensor.dim()} axes, and at most {MAX_AXES} are read"
            )
        if tensor.dtype not in READABLE_DTYPES:
            raise Refused(
                f"{name!a} is a tensor of {tensor.dtype}, and {READ} are read. Convert it with "
                ".float(), where it was made"
            )
    return tensors, metadata, set()


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, str], set[str]]:
    size = os.fstat(file.fileno()).st_size
    budget, foreign = Budget(size), set()
    members = _zip_members(file)
    if any(name.endswith(".npy") for name in members):
        raise Refused("it is an .npz archive of numpy. Pickle a dict of its arrays by name")
    if any("/code/" in name or name.endswith("/constants.pkl") for name in members):
        raise Refused(
            "it is a TorchScript archive, a program with its tensors. Save those alone: "
            "torch.save({'model': torch.jit.load(path).state_dict()}, new_path)"
        )
    folders = {name.partition("/")[0] for name in members if name.endswith("/data.pkl")}
    folder = f"{min(folders, default='')}/"
    if f"{folder}data.pkl" not in members or len(folders) != 1:
        raise Refused("it is a zip archive without one data.pkl, so torch.save did not write it")
    if any(member.is_compressed for member in members.values()):
        raise Refused(
            "it is a compressed zip archive, and torch.save does not compress. Unpack it and pack "
            "it without compression (zip -0 -r), or save it again"
        )
    byte_order = members.get(f"{folder}byteorder")
    if byte_order and bytes(read_extent(file, byte_order).numpy()) != b"little":
        raise Refused(
            "its numbers are not in little-endian byte order. Load it with torch, and save it again"
        )
    pickled = members[f"{folder}data.pkl"]
    read_extent(file, pickled)  # for its checksum
    file.seek(pickled.start)
    bounded = BoundedFile(file, pickled.start + pickled.length)
    value = unpickle(bounded, budget, foreign, persistent_storage)
    prefix = f"{folder}data/"
    storages = {
        name.removeprefix(prefix): member
        for name, member in members.items()
        if name.startswith(prefix)
    }
    return Builder(file, budget, foreign, storages).build(value), {}, foreign


class _ShortReads:
    """A file for `zipfile`, which reads the directory at once, however large it claims to be."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < 0 and whence == 0:
            raise Damaged("a zip directory that starts before the file")
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, length: int = -1) -> bytes:
        left = max(self.size - self.file.tell(), 0)
        length = left if length < 0 else min(length, left)
        if length > _MAX_DIRECTORY:
            raise Damaged(f"a zip directory of more than {_MAX_DIRECTORY} bytes")
        return self.file.read(length)


def _zip_members(file: BinaryIO) -> dict[str, Extent]:
    """The members by name. They lie one after the other, and their headers agree."""
    with zipfile.ZipFile(_ShortReads(file)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        end_of_members = archive.start_dir
    if not entries:
        raise Damaged("a zip archive without members")
    members: dict[str, Extent] = {}
    ends = [entry.header_offset for entry in entries[1:]] + [end_of_members]
    for entry, end in zip(entries, ends):
        name = entry.filename
        if name in members or entry.header_offset < 0:
            raise Damaged(f"two members {name!a}")
        file.seek(entry.header_offset)
        header = file.read(30)
        start = entry.header_offset + 30
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if header[:4] != b"PK\x03\x04" or start + entry.compress_size > end:
            raise Damaged(f"member {name!a} is not where the directory has it")
        # Names in other alphabets may be encoded in two ways; storages have none.
        local_name = file.read(int.from_bytes(header[26:28], "little"))
        if local_name.isascii() and local_name.decode() != entry.orig_filename:
            raise Damaged(f"member {name!a} has another name in the directory")
        is_compressed = entry.compress_type != zipfile.ZIP_STORED
        if entry.flag_bits & 1 or (not is_compressed and entry.compress_size != entry.file_size):
            raise Damaged(f"member {name!a} is encrypted, or has two sizes")
        members[name] = Extent(start, entry.compress_size, entry.CRC, is_compressed)
    return members
