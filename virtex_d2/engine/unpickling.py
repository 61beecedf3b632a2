"""What a pickle says, without doing it.

A pickle is a program that names functions and calls them. Python's unpickler runs it here with a
`find_class` that imports nothing: each name becomes a `Name`, whose call notes what the few
functions behind tensors, arrays and containers would have built, and gives a `Placeholder` for all
others.

It is the unpickler in Python (`pickle._Unpickler`), because the one in C fills its memo up to the
highest index that a file names, and hashes keys before anyone can look at them: the hash of a deep
tuple overflows the stack. Memory is bounded by the file's size: lengths are compared with what the
file still holds before anything is allocated, and what copies draws on a `Budget`.
"""

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from virtex_d2.engine.bounded import BoundedFile, Damaged, Refused

_MAX_KEY_ITEMS = 16
_ELEMENT = 100  # bytes, roughly, that one element takes in a dict, list, set or tuple
_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "_Untyped": torch.uint8,
}
# From the module's dict: getattr(torch, name) imports some of torch's modules on first use.
_TORCH_DTYPES = {name: value for name, value in vars(torch).items() if type(value) is torch.dtype}
READABLE_DTYPES = {*_STORAGE_DTYPES.values(), torch.uint16, torch.uint32, torch.uint64}
READ = "float16, bfloat16, float32, float64, complex numbers, integers and bool"


# --- what stands for the objects of a pickle


class _Inert:
    """Drops the state that a pickle would set: a file changes no attribute."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Stands where an object of another class was, and takes all that a pickle does to one."""

    name: str  # of the class
    # its attributes or items by name, as the pickle has them: unbuilt, and plain values and
    # containers only. May be cyclic
    values: dict[str, Any] = field(default_factory=dict, repr=False)

    def note(self, items: Iterable[tuple[Any, Any]]) -> None:
        """Keep attributes or items that may be settings."""
        plain = (str, int, float, type(None), list, tuple, dict, Placeholder)
        for key, value in items:
            if type(key) is str and isinstance(value, plain):
                self.values[key] = value

    def __call__(self, *_: Any) -> "Placeholder":
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state:  # with slots behind it
            state = state[0]
        if isinstance(state, dict):
            self.note(state.items())

    def append(self, item: Any) -> None:
        """Drop an element."""


@dataclass(frozen=True, eq=False)
class Name(_Inert):
    """A class or function that a pickle names."""

    machine: "Unpickler"
    module: str
    name: str

    @property
    def label(self) -> str:
        """The dotted name, short and printable, whatever the file says."""
        return ascii(f"{self.module}.{self.name}"[:120])[1:-1]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that a name such as torch.float32 stands for, or None."""
        return _TORCH_DTYPES.get(self.name) if self.module == "torch" else None

    def __call__(self, *arguments: Any) -> Any:
        name = (_PYTHON_2_MODULES.get(self.module, self.module), self.name)
        if self.machine.only_storages:
            raise Damaged("a storage that holds other things")
        if name in _UNREADABLE:
            raise Refused(
                f"it holds {_UNREADABLE[name]}, and only dense tensors with values are read. "
                "Convert it to an ordinary tensor, where it was made"
            )
        if name not in _BUILDERS:
            return self.placeholder()
        if arguments and isinstance(arguments[0], Placeholder):
            return arguments[0]  # a list of what a foreign function gives, and the like
        try:
            return _BUILDERS[name](self.machine, *arguments)
        except (TypeError, AttributeError):
            raise Damaged(f"{self.label} with arguments that it does not take") from None

    def placeholder(self) -> Placeholder:
        """Stand in for an object of this class, whose name is noted."""
        self.machine.foreign.add(self.label)
        return Placeholder(self.label)


@dataclass(frozen=True, eq=False)
class StoredStorage(_Inert):
    """A storage that tensors view. Its numbers are the file's, unchecked."""

    key: str
    dtype: torch.dtype  # uint8 where the file leaves it untyped
    numel: int
    start: int = 0  # of a view of it, in elements
    data: bytes | None = None  # where they are within the pickle; otherwise the file has them


@dataclass(frozen=True, eq=False)
class StoredTensor(_Inert):
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

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in tuple("<>=|"):
            raise Damaged("the state of a dtype in an unknown version")
        self.order = state[1]
        self.is_structured = state[2] is not None or state[3] is not None


@dataclass(eq=False)
class StoredArray:
    """A numpy array to be, or a scalar. All of it is as the file has it, unchecked."""

    dtype: Any = None
    shape: Any = ()
    order: str = "C"
    data: Any = b""
    is_scalar: bool = False

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Damaged("the state of an array in an unknown version")
        _, self.shape, self.dtype, is_fortran, self.data = state
        self.order = "F" if is_fortran else "C"


class StoredDict(dict):
    """A dict that may have attributes, of which a state dict's versions of modules are kept."""

    versions: dict | None = None

    def __setstate__(self, state: Any) -> None:
        versions = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(versions, dict) and all(isinstance(v, dict) for v in versions.values()):
            self.versions = versions


# --- the unpickler


def _checked_key(key: Any) -> Any:
    """Return a dict's key or a set's element, if it is safe to hash.

    Hashing a tuple visits all that is in it, and again wherever it recurs: for some tuples that
    never ends, or overflows the stack. Integers beyond 64 bits can be chosen to hash alike.
    """
    is_flat = isinstance(key, tuple) and not any(isinstance(item, tuple) for item in key)
    if is_flat and len(key) <= _MAX_KEY_ITEMS:
        for item in key:
            _checked_key(item)
    elif isinstance(key, int):
        if not -(1 << 63) <= key < 1 << 64:
            raise Damaged("a huge integer as a key")
    elif not isinstance(key, (str, bytes, float, complex, type(None), Placeholder, Name)):
        raise Damaged(f"a {type(key).__name__} as a key")
    return key


class Unpickler(pickle._Unpickler):
    """Reads one pickle. Strings of Python 2 are read as latin-1: arrays' bytes are in them.

    Args:
        file: where the pickle starts.
        foreign: takes the name of each class or function that gave a placeholder.
        storages: takes the storages that the pickle refers to, by key; None: such a reference is
            damage.
        only_storages: whether any call is damage: in a storage within a pickle.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BoundedFile,
        foreign: set[str],
        storages: dict[str, StoredStorage] | None = None,
        only_storages: bool = False,
    ):
        super().__init__(file, encoding="latin1")
        self.budget = file.budget
        self.foreign = foreign
        self.storages = storages
        self.only_storages = only_storages

    def load(self) -> Any:
        """Return plain values, and this module's classes for all else.

        Raises:
            Damaged: it is no whole pickle.
            Refused: it holds what is not read, or takes more than its budget.
        """
        try:
            return super().load()
        except (Refused, Damaged, MemoryError):
            raise
        except Exception as error:  # the instructions do not fit each other
            raise Damaged(f"no sense in its pickle: {type(error).__name__} {error}") from None

    def find_class(self, module: str, name: str) -> Name:
        return Name(self, module, name)

    def get_extension(self, code: int) -> None:
        # The number of a class in a registry, which only the process that wrote the file had.
        self.append(Name(self, "copyreg", f"extension {code}"))

    def persistent_load(self, pid: Any) -> StoredStorage | Name:
        """Return what a persistent id of torch.save stands for.

        That is a storage: ("storage", type, key, location, number of elements), in the old format
        with a sixth part, which is None or the key, start and length of a view. Or, in the old
        format, a module's class: ("module", class, file, source text).
        """
        if self.storages is None:
            raise Damaged("it refers to data outside of itself")
        if isinstance(pid, tuple) and len(pid) == 4 and isinstance(pid[1], Name):
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Damaged("a reference to something else than a storage")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, Name):
            raise Damaged("a storage without a type")
        dtype = _STORAGE_DTYPES.get(kind.name.removesuffix("Storage"))
        if dtype is None or kind.module not in ("torch", "torch.cuda", "torch.storage"):
            raise Refused(
                f"it holds a {kind.label}, and {READ} are read. Convert its tensors with "
                ".dequantize() or .float(), where it was made"
            )
        is_view = view and isinstance(view[0], tuple) and len(view[0]) == 3
        start = view[0][1] if is_view else 0
        if type(key) is not str or type(numel) is not int or type(start) is not int or start < 0:
            raise Damaged("a storage without a key or a length")
        return self.storages.setdefault(key, StoredStorage(key, dtype, numel, start))

    # --- instructions that differ from Python's

    def _nothing(self) -> None:
        """Leave a buffer as it is: what it is for matters to writers only."""

    def _frame(self) -> None:
        self.read(8)  # its length, which helps to read ahead

    def _bytearray(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, (Name, Placeholder)) or not isinstance(arguments, tuple):
            raise Damaged(f"a call of a {type(function).__name__}")
        self.append(function(*arguments))

    def _call_with_keywords(self) -> None:
        self.stack.pop()  # no class that is read has any
        self._call()

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._fill(self.stack[-1], items)

    def _new_dict(self) -> None:
        items, content = self.pop_mark(), {}
        self._fill(content, items)
        self.append(content)

    def _fill(self, target: Any, items: list) -> None:
        """Set keys and values, which alternate in `items`; a placeholder notes them."""
        if isinstance(target, Placeholder):
            target.note(zip(items[::2], items[1::2]))
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged(f"keys and values for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            target[_checked_key(key)] = value

    def _add_items(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(_checked_key, items))
        elif not isinstance(self.stack[-1], Placeholder):
            raise Damaged(f"set elements for a {type(self.stack[-1]).__name__}")

    def _new_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_checked_key, items)))

    dispatch |= {
        pickle.FRAME[0]: _frame,
        pickle.READONLY_BUFFER[0]: _nothing,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.NEWOBJ_EX[0]: _call_with_keywords,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _new_dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _new_frozenset,
    }


# --- torch.save's format until torch 1.5, which a tensor's storage in a plain pickle still has

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_legacy(
    file: BoundedFile, foreign: set[str], only_storages: bool = False
) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read what follows the magic number in a file of torch.save's old format.

    Pickles of a version, of facts about the machine, of the object, and of the storages' keys;
    then, in the keys' order, each storage's number of elements (8 bytes) and its elements.

    Returns:
        The object, and where each storage lies: key -> position and length in bytes.
    """
    if Unpickler(file, foreign).load() != _LEGACY_PROTOCOL:
        raise Damaged(f"a version of torch's old format that is not {_LEGACY_PROTOCOL}")
    machine = Unpickler(file, foreign).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused(
            "its numbers are in big-endian byte order. Load it on the machine that wrote it, and "
            "save it again with a new version of torch, which notes the order"
        )
    claimed: dict[str, StoredStorage] = {}
    value = Unpickler(file, foreign, claimed, only_storages).load()
    keys = Unpickler(file, foreign).load()
    if not isinstance(keys, list):
        raise Damaged("no list of its storages")
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key not in claimed or key in found:
            raise Damaged("a storage that no tensor has, or twice the same")
        length = int.from_bytes(file.read(8), "little") * claimed[key].dtype.itemsize
        found[key] = file.skip(length), length
    return value, found


# --- what is noted for each function that a pickle of tensors calls; (Unpickler, *its arguments)


def _tensor(machine, storage, offset, size, stride, *rest):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2 (gradient, hooks, flags)."""
    return _typed_tensor(machine, storage, offset, size, stride, None, None, None, *rest[2:])


def _typed_tensor(machine, storage, offset, size, stride, _grad, _hooks, dtype, flags=None):
    """torch._utils._rebuild_tensor_v3, of dtypes that have no storage type of their own."""
    if not isinstance(storage, StoredStorage):
        raise Damaged("a tensor without a storage")
    stored = storage.dtype if dtype is None else dtype.dtype
    if stored not in READABLE_DTYPES:
        raise Refused(
            f"it holds a tensor of {dtype.label}, and {READ} are read. Convert it with .float(), "
            "where it was made"
        )
    if isinstance(flags, dict) and any(value is not False for value in flags.values()):
        raise Refused("it holds a conjugated or negated view. Save its .clone(), where it was made")
    return StoredTensor(storage, offset, size, stride, stored)


def _parameter(machine, data, *_):
    if not isinstance(data, StoredTensor):
        raise Damaged("a parameter without a tensor")
    return data


def _tensor_with_attributes(machine, function, cls, arguments, *_):
    """torch._tensor._rebuild_from_type_v2: of a subclass, or with attributes (dropped here)."""
    plain = {("torch", "Tensor"), ("torch._tensor", "Tensor"), ("torch.nn.parameter", "Parameter")}
    if (cls.module, cls.name) not in plain:
        return cls.placeholder()
    if function.module != "torch._utils":
        raise Damaged("a tensor that something else than torch builds")
    return function(*arguments)


def _embedded_storage(machine, data):
    """torch.storage._load_from_bytes: how a tensor is in a pickle that torch.save did not write."""
    file, foreign = BoundedFile(io.BytesIO(data), len(data), machine.budget), set()
    if Unpickler(file, foreign, only_storages=True).load() != LEGACY_MAGIC:
        raise Damaged("a storage in an unknown format")
    storage, found = read_legacy(file, foreign, only_storages=True)
    if not isinstance(storage, StoredStorage) or storage.key not in found:
        raise Damaged("a storage without its elements")
    position, length = found[storage.key]
    machine.budget.spend(length)
    return replace(storage, data=data[position : position + length])


def _array(machine, cls, *_):
    """numpy's _reconstruct: an empty array, whose state follows."""
    return StoredArray() if (cls.module, cls.name) == ("numpy", "ndarray") else cls.placeholder()


def _array_of_buffer(machine, data, dtype, shape, order, axes=None):
    """numpy's _frombuffer, of pickle protocol 5."""
    if order not in ("C", "F") or axes is not None:
        raise Refused(
            "it holds an array with permuted axes. Save numpy.ascontiguousarray of it, where it "
            "was made"
        )
    return StoredArray(dtype, shape, order, data)


def _encode(machine, text, encoding):
    """_codecs.encode: how the bytes of Python 3 are in pickles of protocol 2."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes that are not written as latin-1")
    machine.budget.spend(len(text))
    return text.encode("latin-1")


def _bytes(machine, data=b""):
    if not isinstance(data, (bytes, bytearray)):
        raise Damaged(f"bytes made of a {type(data).__name__}")
    return data


def _dict(machine, items=()):
    if not isinstance(items, (dict, list, tuple)):
        raise Damaged(f"a dict made of a {type(items).__name__}")
    machine.budget.spend(_ELEMENT * len(items))
    pairs = items.items() if isinstance(items, dict) else items
    return StoredDict({_checked_key(key): value for key, value in pairs})


def _container(kind: type, is_hashed: bool) -> Callable[..., Any]:
    def build(machine, items=()):
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise Damaged(f"a {kind.__name__} made of a {type(items).__name__}")
        machine.budget.spend(_ELEMENT * len(items))
        return kind(map(_checked_key, items) if is_hashed else items)

    return build


def _complex(machine, real, imaginary):
    if type(real) is not float or type(imaginary) is not float:
        raise Damaged("a complex number of other parts than floats")
    return complex(real, imaginary)


def _device(machine, kind, index=None):
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Damaged("a device without a name")
    return kind if index is None else f"{kind}:{index}"


def _object(machine, cls, _base=None, items=None, *_):
    """copyreg._reconstructor: any object, in protocols 0 and 1; of a dict's kind with its items."""
    placeholder = cls.placeholder()
    placeholder.note(items.items() if isinstance(items, dict) else ())
    return placeholder


_PYTHON_2_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",  # of numpy 1
    "numpy.core.numeric": "numpy._core.numeric",
}
_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    ("torch.storage", "_load_from_bytes"): _embedded_storage,
    ("torch", "Size"): _container(tuple, is_hashed=False),
    ("torch", "device"): _device,
    # A dtype of another library is a class; it is named if an array has it.
    ("numpy", "dtype"): lambda _, code, *__: StoredDtype(code if type(code) is str else code.label),
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "scalar"): lambda _, dtype, data=b"": StoredArray(
        dtype, (), "C", data, is_scalar=True
    ),
    ("numpy._core.numeric", "_frombuffer"): _array_of_buffer,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _object,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): lambda machine, _=None, items=(): _dict(machine, items),
    ("builtins", "dict"): _dict,
    ("builtins", "list"): _container(list, is_hashed=False),
    ("builtins", "tuple"): _container(tuple, is_hashed=False),
    ("builtins", "set"): _container(set, is_hashed=True),
    ("builtins", "frozenset"): _container(frozenset, is_hashed=True),
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
}
_OTHER_DEVICE = "a tensor of another kind of device (XLA, ...)"
_UNREADABLE = {
    ("torch._utils", name): what
    for name, what in {
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_sparse_csr_tensor": "a sparse tensor",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_qtensor": "a quantized tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no values",
        "_rebuild_wrapper_subclass": "a tensor that wraps others (DTensor and the like)",
        "_rebuild_device_tensor_from_numpy": _OTHER_DEVICE,
        "_rebuild_device_tensor_from_cpu_tensor": _OTHER_DEVICE,
    }.items()
}
