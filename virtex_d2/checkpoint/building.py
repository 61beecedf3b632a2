"""Tensors and plain values from what a pickle describes, each number checked before it is used."""

import math
import re
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from virtex_d2.checkpoint.rebuilding import torch_dtype
from virtex_d2.checkpoint.stored import (
    Budget,
    Damaged,
    Global,
    Placeholder,
    Refused,
    StoredArray,
    StoredDtype,
    StoredStorage,
    StoredTensor,
)

MAX_DEPTH = 100  # of dicts, lists and tuples in each other
MAX_AXES = 32
_TENSOR = 512  # bytes, roughly, that a tensor takes besides its elements
_SCALARS = frozenset((str, bytes, int, float, complex, bool, type(None)))
# "b1" is bool and "i1" int8.
_NUMPY_DTYPES = frozenset(
    ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
)
# Bytes, text, void, dates and spans of time.
_NO_NUMBERS = re.compile(r"[SUVMma][0-9]*")


@dataclass(frozen=True)
class Extent:
    """Bytes of a file: where they start, how many they are, their CRC-32 (0: none is stored)."""

    start: int
    length: int
    crc: int = 0
    is_compressed: bool = False


def read_extent(file: BinaryIO, extent: Extent) -> torch.Tensor:
    """Bytes of a file, which has been found to be as long, as a uint8 tensor."""
    raw = torch.empty(extent.length, dtype=torch.uint8)
    view = memoryview(raw.numpy())
    file.seek(extent.start)
    if file.readinto(view) != extent.length:
        raise Damaged("it became shorter while it was read")
    # torch can be told not to compute checksums, and writes 0 then.
    if extent.crc and zlib.crc32(view) != extent.crc:
        raise Damaged(f"the checksum of the {extent.length} bytes at {extent.start} is wrong")
    return raw


class Builder:
    """Builds what a pickle describes.

    Args:
        file: that has the storages.
        budget: shared with the pickle.
        foreign: takes the names of classes that stand in the content themselves.
        storages: where they lie in the file, by key.
    """

    def __init__(
        self,
        file: BinaryIO,
        budget: Budget,
        foreign: set[str],
        storages: dict[str, Extent],
    ):
        self.file = file
        self.budget = budget
        self.foreign = foreign
        self.storages = storages
        self.raw: dict[str | StoredStorage, torch.Tensor] = {}
        self.given: set[str | StoredStorage] = set()  # whose memory is a tensor's already
        self.place: list = []  # keys and indices down to what is being built, for messages

    def build(self, value: Any) -> Any:
        """The content, see `StoredCheckpoint`."""
        try:
            return self._build(value)
        except Refused as refusal:
            raise Refused(f"at {self._where()}, {refusal}") from None
        except (Damaged, ValueError) as damage:
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
            return self._placeholder(Global("torch", "UntypedStorage"))
        if isinstance(value, StoredDtype):
            return value.code
        if isinstance(value, Global):
            dtype = torch_dtype(value)
            return str(dtype) if dtype else self._placeholder(value)
        if isinstance(value, bytearray):
            self.budget.spend(len(value))
            return bytes(value)
        return value  # a placeholder

    def _container(self, value: dict | list | tuple) -> dict | list | tuple:
        # Also what stops at a list that contains itself.
        if len(self.place) >= MAX_DEPTH:
            raise Refused(
                f"its values are nested more than {MAX_DEPTH} deep. Save the tensors by name, in "
                "one dict"
            )
        self.place.append(None)
        if isinstance(value, dict):
            content: Any = {}
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

    def _placeholder(self, cls: Global) -> Placeholder:
        self.foreign.add(cls.label)
        return Placeholder(cls.label)

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
        is_contiguous = stride == _contiguous_stride(size, stride)
        if is_contiguous and numel * itemsize == raw.numel() and key not in self.given:
            self.given.add(key)
            return raw.view(stored.dtype).view(size)
        self.budget.spend(numel * itemsize + _TENSOR)
        elements = raw[: available * itemsize].view(stored.dtype)
        if is_contiguous:
            return elements[first : first + numel].clone().view(size)
        view = elements.as_strided(size, stride, first)
        return view.clone(memory_format=torch.contiguous_format)

    def _storage(self, storage: StoredStorage) -> tuple[torch.Tensor, str | StoredStorage]:
        """A storage's bytes, and the key under which they are kept."""
        key = storage if storage.data is not None else storage.key
        if key not in self.raw:
            if storage.data is not None:
                self.budget.spend(len(storage.data) + _TENSOR)
                self.raw[key] = torch.empty(len(storage.data), dtype=torch.uint8)
                self.raw[key].numpy()[:] = np.frombuffer(storage.data, np.uint8)
            elif key in self.storages:
                self.budget.spend(_TENSOR)
                self.raw[key] = read_extent(self.file, self.storages[key])
            else:
                raise Damaged(f"no storage {ascii(key)[:80]} in the file")
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
            return self._placeholder(Global("numpy", "ndarray"))
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
        if numel == 0:
            return torch.from_numpy(np.empty(shape, dtype=numpy_dtype.newbyteorder("=")))
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode("latin-1")
        array = np.frombuffer(data, numpy_dtype).reshape(shape, order=stored.order)
        if stored.is_scalar:
            return array.item()
        # order="C" also makes it contiguous; a copy, for `array` is of bytes that cannot change.
        return torch.from_numpy(array.astype(numpy_dtype.newbyteorder("="), order="C", copy=True))


def _checked_shape(shape: Any) -> tuple[tuple[int, ...], int]:
    """A shape that can be one, and its number of elements."""
    if not isinstance(shape, tuple) or len(shape) > MAX_AXES:
        raise Damaged("a shape that is no shape")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Damaged("a shape of other than counts")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise Damaged("a shape of more elements than fit anywhere")
    return shape, math.prod(shape)


def _contiguous_stride(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a contiguous tensor; that of an axis of length 1 may be any."""
    expected, step = [], 1
    for n, given in zip(reversed(size), reversed(stride)):
        expected.append(given if n == 1 else step)
        step *= n
    return tuple(reversed(expected))
