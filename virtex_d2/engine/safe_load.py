"""The one reader of checkpoints: tensors and plain values of any file, and none of its code runs.

The format is found from the content: safetensors, torch.save's zip archive, torch.save's format
until 1.5, or a plain pickle of numpy arrays (detectron2's and Caffe2's model zoos). Pickles are
read by `unpickling`, which calls nothing, and the tensors that they describe are made here, each
number compared with the bytes that are there.
"""

import io
import math
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from virtex_d2.engine.bounded import BoundedFile, Budget, Damaged, Refused
from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.files import checksum_damage, read_safetensors, require_file
from virtex_d2.engine.unpickling import (
    LEGACY_MAGIC,
    READ,
    READABLE_DTYPES,
    Name,
    Placeholder,
    StoredArray,
    StoredDict,
    StoredDtype,
    StoredStorage,
    StoredTensor,
    Unpickler,
    read_legacy,
)

_MAX_DEPTH = 100  # of dicts, lists and tuples in each other
_MAX_AXES = 32
_TENSOR = 512  # bytes, roughly, that a tensor takes besides its elements
_SCALARS = frozenset((str, bytes, int, float, complex, bool, type(None)))
# "b1" is bool and "i1" int8.
_NUMPY_DTYPES = frozenset(
    ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
)
_NO_NUMBERS = re.compile(r"[SUVMma][0-9]*")  # bytes, text, void, dates and spans of time
_SAVE_ALONE = (
    "Save the state dict alone, where it was trained: "
    "torch.save({'model': model.state_dict()}, path)."
)


@dataclass(frozen=True)
class StoredCheckpoint:
    """What is in a checkpoint file."""

    path: str  # of the file
    format: str  # "torch zip", "torch legacy", "safetensors" or "pickle"
    # dicts, lists, tuples, sets and scalars, as they are nested in the file (each value with a copy
    # of its own, where the file refers to one value twice), and as leaves CPU tensors, each in its
    # own memory without gaps, without gradient, in the dtype of the file: bool, (u)int8 to
    # (u)int64, float16, bfloat16, float32, float64, complex64 or complex128. Arrays of numpy are
    # tensors too, its scalars Python's. A dtype or device is its name. A `Placeholder` stands where
    # an object of another class was
    content: Any
    metadata: dict[str, str]  # strings by name, of safetensors files; {} for others
    # the names of the classes and functions whose results were replaced, sorted
    foreign: tuple[str, ...]


def read_tensors(path: str | os.PathLike) -> StoredCheckpoint:
    """Read the tensors of anybody's checkpoint, and the plain values among them."""
    stored = read_stored(path)
    if isinstance(stored.content, Placeholder):
        raise InputError(
            f"{path}: expected tensors by name, found one object of {stored.content.name}, which "
            f"only its own code can open, and code from a file is not run. {_SAVE_ALONE}"
        )
    if not _has_tensor(stored.content):
        foreign = stored.foreign
        inside = f", outside of objects of other classes ({some(foreign, 5)})" if foreign else ""
        raise InputError(f"{path}: expected tensors, found none{inside}. {_SAVE_ALONE}")
    return stored


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint of a training run: all of it, or nothing."""
    return whole_content(read_stored(path))


def whole_content(stored: StoredCheckpoint) -> dict[str, Any]:
    """A file's content, if it is a dict and nothing in it was replaced."""
    if not isinstance(stored.content, dict):
        value = stored.content
        found = value.name if isinstance(value, Placeholder) else type(value).__name__
        raise InputError(f"{stored.path}: expected a checkpoint (a dict), found a {found}.")
    # Arrays of text stand beside the weights in some files of the model zoos.
    dropped = {"numpy.ndarray"} if stored.format == "pickle" else set()
    if foreign := set(stored.foreign) - dropped:
        raise InputError(
            f"{stored.path}: refused, because besides tensors it holds Python objects "
            f"({some(sorted(foreign), 5)}), and building such objects could run any code. "
            + _SAVE_ALONE
        )
    return stored.content


def read_stored(path: str | os.PathLike) -> StoredCheckpoint:
    """Read a file, whatever is in it, after a look at its own checksum, if it has one."""
    path = os.fsdecode(path)
    require_file(path)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    if found := checksum_damage(path):
        raise InputError(
            f"{path}: expected a whole checkpoint, but the file is truncated or damaged: {found}. "
            "Copy it again, or use an older one."
        )
    kind, foreign = "checkpoint", set()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            kind, read = _format(file, size)
            content, metadata = read(file, size, foreign)
    except Refused as refusal:
        raise InputError(f"{path}: refused: {refusal}.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except (MemoryError, InputError):
        raise
    except Exception as error:  # Damaged, or of zipfile, numpy or torch, which find no sense in it
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{path}: expected a whole {kind} file, but it is damaged or cut short "
            f"({ascii(text)[1:-1]}). Copy or download it again."
        ) from error
    return StoredCheckpoint(path, kind, content, metadata, tuple(sorted(foreign)))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_tensor, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)


# --- formats

_Read = Callable[[BinaryIO, int, set[str]], tuple[Any, dict[str, str]]]
# What else people have under a checkpoint's name: where its mark is, what it is, and what to do.
_OTHER_FILES = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "Fetch the file with `git lfs pull`"),
    (0, b"<", "a web page or XML", "The download failed: try the address in a browser"),
    (0, b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (0, b"BZh", "a bzip2 archive", "Unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive", "Unpack it first"),
    (0, b"\x93NUMPY", "a single numpy array", "Pickle a dict of arrays by name"),
    (0, b"\x89HDF", "an HDF5 file", "Convert it to safetensors with the library that wrote it"),
    (0, b"GGUF", "a GGUF file", "Convert it to safetensors with the library that wrote it"),
    (
        *(257, b"ustar", "a tar archive, as torch.save wrote before 2017"),
        "Load it with an old version of torch, and save it again",
    ),
)


def _format(file: BinaryIO, size: int) -> tuple[str, _Read]:
    """Name and reader of the format that a file's first bytes are of."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise Refused("it is empty. Copy or download it again")
    for start, mark, found, advice in _OTHER_FILES:
        if head[start:].startswith(mark):
            raise Refused(f"it is {found}, no checkpoint. {advice}")
    if head.startswith(b"PK\x03\x04"):
        return "torch zip", _read_zip
    # The length of a header, of at most 4 GiB, and the header's first character.
    if head[4:9] == b"\0\0\0\0{":
        if int.from_bytes(head[:8], "little") > size - 8:
            raise Damaged("the header of safetensors would be longer than the file")
        return "safetensors", _read_safetensors
    if head[:1] in (b"\x80", b"(", b"]", b"}", b"c"):
        magic = LEGACY_MAGIC.to_bytes(10, "little")
        return ("torch legacy" if magic in head[:40] else "pickle"), _read_pickle
    raise Refused(
        f"it starts with {head[:8]!r}, and is no format that is known here: torch.save's, "
        "safetensors, or a pickle of numpy arrays. Check the path"
    )


def _read_pickle(file: BinaryIO, size: int, foreign: set[str]) -> tuple[Any, dict[str, str]]:
    budget = Budget(size)
    bounded = BoundedFile(file, size, budget)
    value, extents = Unpickler(bounded, foreign).load(), {}
    if value == LEGACY_MAGIC:
        value, extents = read_legacy(bounded, foreign)

    def storage(key: str) -> torch.Tensor | None:
        if key not in extents:
            return None
        start, length = extents[key]
        raw = torch.empty(length, dtype=torch.uint8)
        file.seek(start)
        file.readinto(memoryview(raw.numpy()))
        return raw

    return _Builder(budget, foreign, storage).build(value), {}


def _read_safetensors(file: BinaryIO, size: int, foreign: set[str]) -> tuple[Any, dict[str, str]]:
    tensors, metadata = read_safetensors(file.name)
    for name, tensor in tensors.items():
        if tensor.dim() > _MAX_AXES:
            raise Refused(
                f"{name!a} is a tensor of {tensor.dim()} axes, and at most {_MAX_AXES} are read"
            )
        if tensor.dtype not in READABLE_DTYPES:
            raise Refused(
                f"{name!a} is a tensor of {tensor.dtype}, and {READ} are read. Convert it with "
                ".float(), where it was made"
            )
    # Copies: what the library returns may be pages of the file, and change with it.
    return {name: tensor.clone() for name, tensor in tensors.items()}, metadata


def _read_zip(file: BinaryIO, size: int, foreign: set[str]) -> tuple[Any, dict[str, str]]:
    budget, storages = Budget(size), {}
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, size)
        folder = next(name for name in members if name.endswith("data.pkl"))[: -len("data.pkl")]
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise Refused(
                "its numbers are not in little-endian byte order. Load it with torch, and save it "
                "again"
            )
        pickled = archive.read(f"{folder}data.pkl")
        bounded = BoundedFile(io.BytesIO(pickled), len(pickled), budget)
        value = Unpickler(bounded, foreign, storages).load()

        def storage(key: str) -> torch.Tensor | None:
            member = members.get(f"{folder}data/{key}")
            if member is None:
                return None
            budget.spend(member.file_size)  # members may share bytes
            raw = torch.empty(member.file_size, dtype=torch.uint8)
            with archive.open(member) as stream:
                stream.readinto(memoryview(raw.numpy()))
            return raw

        return _Builder(budget, foreign, storage).build(value), {}


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive of torch.save's by name; zipfile checks them as they are read."""
    members = {member.filename: member for member in archive.infolist()}
    if any(name.endswith(".npy") for name in members):
        raise Refused("it is an .npz archive of numpy. Pickle a dict of its arrays by name")
    if any("/code/" in name or name.endswith("/constants.pkl") for name in members):
        raise Refused(
            "it is a TorchScript archive, a program with its tensors. Save those alone: "
            "torch.save({'model': torch.jit.load(path).state_dict()}, new_path)"
        )
    if sum(re.fullmatch("[^/]+/data.pkl", name) is not None for name in members) != 1:
        raise Refused("it is a zip archive without one data.pkl, so torch.save did not write it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise Refused(
            "it is a compressed zip archive, and torch.save does not compress. Unpack it and pack "
            "it without compression (zip -0 -r), or save it again"
        )
    if len(members) != len(archive.infolist()):
        raise Damaged("two members of one name")
    for name, member in members.items():
        if member.compress_size != member.file_size or member.file_size > size:
            raise Damaged(f"member {name!a} is longer than the file, or has two sizes")
        member.CRC = member.CRC or None  # torch can be told not to compute checksums
    return members


# --- tensors of what a pickle describes


class _Builder:
    """Builds what a pickle describes.

    Args:
        foreign: takes the names of classes that stand in the content themselves.
        storage: gives a storage's bytes (uint8) by key; None where the file has none.
    """

    def __init__(
        self,
        budget: Budget,
        foreign: set[str],
        storage: Callable[[str], torch.Tensor | None],
    ):
        self.budget = budget
        self.foreign = foreign
        self.storage = storage
        self.raw: dict[str | StoredStorage, torch.Tensor] = {}
        self.given: set[str | StoredStorage] = set()  # whose memory is a tensor's already
        self.place: list = []  # keys and indices down to what is being built, for messages

    def build(self, value: Any) -> Any:
        """Return the content, see `StoredCheckpoint`."""
        try:
            return self._build(value)
        except Refused as refusal:
            raise Refused(f"at {self._where()}, {refusal}") from None
        except (Damaged, ValueError, EOFError, zipfile.BadZipFile) as damage:
            raise Damaged(f"at {self._where()}: {damage}") from None

    def _where(self) -> str:
        simple = (str, int, float, bytes)
        names = [str(key)[:80] if type(key) in simple else type(key).__name__ for key in self.place]
        return ascii(" / ".join(names[-8:]))

    def _build(self, value: Any) -> Any:
        self.budget.step()
        if type(value) in _SCALARS:
            return value
        if isinstance(value, (dict, list, tuple)):
            return self._container(value)
        if isinstance(value, (set, frozenset)):
            return {self._build(item) for item in value}
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, StoredArray):
            return self._array(value)
        if isinstance(value, StoredStorage):
            return self._placeholder("torch.UntypedStorage")
        if isinstance(value, StoredDtype):
            return value.code
        if isinstance(value, Name):
            return str(value.dtype) if value.dtype else self._placeholder(value.label)
        if isinstance(value, bytearray):
            self.budget.spend(len(value))
            return bytes(value)
        return value  # a placeholder

    def _container(self, value: dict | list | tuple) -> dict | list | tuple:
        # Also what stops at a list that contains itself.
        if len(self.place) >= _MAX_DEPTH:
            raise Refused(
                f"its values are nested more than {_MAX_DEPTH} deep. Save the tensors by name, in "
                "one dict"
            )
        self.place.append(None)
        if isinstance(value, dict):
            content: Any = {}
            if isinstance(value, StoredDict) and value.versions is not None:
                content = OrderedDict()
                content._metadata = self._build(value.versions)
            for key, item in value.items():
                self.place[-1] = key
                content[self._build(key)] = self._build(item)
        else:
            content = []
            for index, item in enumerate(value):
                self.place[-1] = index
                content.append(self._build(item))
        self.place.pop()
        return tuple(content) if isinstance(value, tuple) else content

    def _placeholder(self, name: str) -> Placeholder:
        self.foreign.add(name)
        return Placeholder(name)

    def _tensor(self, stored: StoredTensor) -> torch.Tensor:
        size, numel = _checked_shape(stored.size)
        stride, itemsize = stored.stride, stored.dtype.itemsize
        if not isinstance(stride, tuple) or len(stride) != len(size):
            raise Damaged("a tensor with fewer strides than axes")
        if not all(type(n) is int and n >= 0 for n in (*stride, stored.offset)):
            raise Damaged("a tensor with a negative stride or offset")
        raw, key = self._storage(stored.storage)
        before = stored.storage.start * stored.storage.dtype.itemsize
        if before % itemsize:
            raise Damaged("a view that starts within an element")
        first = before // itemsize + stored.offset
        last = first + sum((n - 1) * step for n, step in zip(size, stride))
        available = raw.numel() // itemsize
        if numel == 0:
            self.budget.spend(_TENSOR)
            return torch.empty(size, dtype=stored.dtype)
        if last >= available:
            raise Damaged(f"a tensor that reaches beyond the {available} elements of its storage")
        view = raw[: available * itemsize].view(stored.dtype).as_strided(size, stride, first)
        if view.is_contiguous() and numel * itemsize == raw.numel() and key not in self.given:
            self.given.add(key)
            return view
        self.budget.spend(numel * itemsize + _TENSOR)
        return view.clone()

    def _storage(self, storage: StoredStorage) -> tuple[torch.Tensor, str | StoredStorage]:
        """A storage's bytes, and the key under which they are kept."""
        key = storage if storage.data is not None else storage.key
        if key not in self.raw:
            self.budget.spend(_TENSOR)
            if storage.data is None:
                raw = self.storage(key)
            else:
                raw = torch.from_numpy(np.frombuffer(storage.data, np.uint8).copy())
            if raw is None:
                raise Damaged(f"no storage {ascii(key)[:80]} in the file")
            self.raw[key] = raw
        raw = self.raw[key]
        if storage.numel * storage.dtype.itemsize != raw.numel():
            raise Damaged(f"a storage of {raw.numel()} bytes, where another number is announced")
        return raw, key

    def _array(self, stored: StoredArray) -> Any:
        shape, numel = _checked_shape(stored.shape)
        dtype = stored.dtype
        if not isinstance(dtype, StoredDtype):
            raise Damaged("an array without a dtype")
        if dtype.code[:1] == "O":
            raise Refused("it holds an array of Python objects, not of numbers. Save lists instead")
        if dtype.is_structured or _NO_NUMBERS.fullmatch(dtype.code):
            return self._placeholder("numpy.ndarray")
        if dtype.code not in _NUMPY_DTYPES:
            raise Refused(
                f"it holds an array of dtype {ascii(dtype.code)[:80]}, which torch does not have. "
                "Convert it with .astype('float32'), where it was made"
            )
        order = "=" if dtype.order == "|" else dtype.order
        numpy_dtype = np.dtype(order + dtype.code)
        data = stored.data
        if not isinstance(data, (bytes, bytearray, str)):
            raise Damaged("an array without bytes")
        if len(data) != numel * numpy_dtype.itemsize:
            raise Damaged(f"an array of {len(data)} bytes, where its shape needs another number")
        self.budget.spend(len(data) + _TENSOR)
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode("latin-1")
        array = np.frombuffer(data, numpy_dtype, numel).reshape(shape, order=stored.order)
        if stored.is_scalar:
            return array.item()
        # order="C" also makes it contiguous; a copy, for `array` is of bytes that cannot change.
        return torch.from_numpy(array.astype(numpy_dtype.newbyteorder("="), order="C", copy=True))


def _checked_shape(shape: Any) -> tuple[tuple[int, ...], int]:
    """A shape that can be one, and its number of elements."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_AXES:
        raise Damaged("a shape that is no shape")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Damaged("a shape of other than counts")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise Damaged("a shape of more elements than fit anywhere")
    return shape, math.prod(shape)
