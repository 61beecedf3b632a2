"""What a checkpoint file says is in it, before any of it is built or believed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

# An R-50's checkpoint takes some ten thousand steps, with its optimizer thirty thousand.
MAX_STEPS = 2_000_000
_MAX_KEY_ITEMS = 16


class Refused(Exception):  # noqa: N818  # the program is right, and so may be the file
    """The file holds what is not read. The message is one or more sentences about "it"."""


class Damaged(Exception):  # noqa: N818
    """The bytes are not what a program wrote. The message is the reason, in a few words."""


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Stands where an object of another class was.

    Attributes:
        name: of the class.
        values: its attributes or items by name, as the pickle has them: unbuilt, and plain values
            and containers only. May be cyclic.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict, repr=False)

    def note(self, items: Iterable[tuple[Any, Any]]) -> None:
        """Keep attributes or items that may be settings."""
        plain = (str, int, float, type(None), list, tuple, dict, Placeholder)
        for key, value in items:
            if type(key) is str and isinstance(value, plain):
                self.values[key] = value


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str

    @property
    def label(self) -> str:
        """The dotted name, short and printable, whatever the file says."""
        return ascii(f"{self.module}.{self.name}"[:120])[1:-1]


@dataclass(frozen=True, eq=False)
class StoredStorage:
    """A storage that tensors view.

    Attributes:
        key: its name in the file.
        dtype: of its elements; uint8 where the file leaves it untyped.
        numel: of the storage, in elements, as the pickle claims.
        start: of the view in the storage, in elements.
        data: its bytes, where they are within the pickle; otherwise the file has them.
    """

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0
    data: memoryview | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor to be: a view of a storage, in elements of `dtype`. The numbers are unchecked."""

    storage: StoredStorage
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype


@dataclass(eq=False)
class StoredDtype:
    """A numpy dtype: its code, e.g. "f4", and its byte order, one of "<>=|"."""

    code: str
    order: str = "="
    is_structured: bool = False


@dataclass(eq=False)
class StoredArray:
    """A numpy array to be, or a scalar. All of it is as the file has it, unchecked."""

    dtype: Any = None
    shape: Any = ()
    order: str = "C"
    data: Any = b""
    is_scalar: bool = False


class Budget:
    """What reading one file may take in all: steps, and bytes beside those of the file."""

    def __init__(self, file_size: int):
        # Tied weights and views are copied, each of them; more than four copies of everything is
        # no checkpoint. The constant is for small files of broadcast tensors.
        self.limit = self.bytes_left = 4 * file_size + (64 << 20)
        self.steps_left = MAX_STEPS

    def spend(self, num_bytes: int) -> None:
        """Account for memory, before it is allocated."""
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise Refused(
                f"its content would unfold to more than {self.limit >> 20} MiB, far more than the "
                "file has. Save copies of the tensors alone"
            )

    def step(self) -> None:
        """Account for an instruction of a pickle, or for a value of what it builds."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Refused(
                f"it has more than {MAX_STEPS} values and instructions. Save the tensors alone, "
                "without long lists beside them"
            )


class BoundedFile:
    """An open file, from where it stands up to a position, that never reads further.

    A read of more than is left fails before anything is allocated.
    """

    def __init__(self, file: BinaryIO, end: int):
        self.file = file
        self.left = end - file.tell()

    def tell(self) -> int:
        return self.file.tell()

    def read(self, length: int) -> bytes:
        self._take(length)
        data = self.file.read(length)
        if len(data) != length:
            raise Damaged("it became shorter while it was read")
        return data

    def skip(self, length: int) -> None:
        self._take(length)
        self.file.seek(length, 1)

    def readline(self) -> bytes:
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line

    def _take(self, length: int) -> None:
        if not 0 <= length <= self.left:
            raise Damaged(f"{length:#x} more bytes should follow, and there are {self.left:#x}")
        self.left -= length


def checked_key(key: Any) -> Any:
    """A dict's key or a set's element, if it is safe to hash.

    Hashing a tuple visits all that is in it, and again wherever it recurs: for some tuples that
    never ends, or overflows the stack. Integers beyond 64 bits can be chosen to hash alike.

    Raises:
        Damaged: it is not.
    """
    is_flat = isinstance(key, tuple) and not any(isinstance(item, tuple) for item in key)
    if is_flat and len(key) <= _MAX_KEY_ITEMS:
        for item in key:
            checked_key(item)
    elif isinstance(key, int):
        if not -(1 << 63) <= key < 1 << 64:
            raise Damaged("a huge integer as a key")
    elif not isinstance(key, (str, bytes, float, complex, type(None), Placeholder, Global)):
        raise Damaged(f"a {type(key).__name__} as a key")
    return key
