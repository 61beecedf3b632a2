"""What stands for the functions that a pickle of tensors calls, and torch.save's old format.

Every class and function that a checkpoint may name is in one of the tables below. What is named
there is written down as one of the classes of `stored`; all else gives a placeholder.
"""

import io
from collections.abc import Callable
from typing import Any

import torch

from virtex_d2.checkpoint.stored import (
    BoundedFile,
    Budget,
    Damaged,
    Global,
    Placeholder,
    Refused,
    StoredArray,
    StoredDtype,
    StoredStorage,
    StoredTensor,
    checked_key,
)
from virtex_d2.checkpoint.unpickling import Unpickler

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
_STORAGE_TYPES = {
    (module, f"{name}Storage"): dtype
    for name, dtype in _STORAGE_DTYPES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
# From the module's dict: getattr(torch, name) imports some of torch's modules on first use.
_TORCH_DTYPES = {name: value for name, value in vars(torch).items() if type(value) is torch.dtype}
READABLE_DTYPES = {*_STORAGE_DTYPES.values(), torch.uint16, torch.uint32, torch.uint64}
READ = "float16, bfloat16, float32, float64, complex numbers, integers and bool"


def unpickle(
    file: BoundedFile,
    budget: Budget,
    foreign: set[str],
    persistent: Callable[[Any], Any] | None = None,
    is_nested: bool = False,
) -> Any:
    """What the next pickle in a file builds; see `Unpickler`.

    Raises:
        Damaged: it is no whole pickle.
        Refused: it holds what is not read, or takes more than its budget.
    """
    rebuild = _rebuild_nested if is_nested else _rebuild
    return Unpickler(file, budget, foreign, rebuild, persistent).load()


def torch_dtype(value: Any) -> torch.dtype | None:
    """The dtype that a name such as torch.float32 stands for, or None."""
    is_name = isinstance(value, Global) and value.module == "torch"
    return _TORCH_DTYPES.get(value.name) if is_name else None


def persistent_storage(pid: Any) -> StoredStorage | Global:
    """What a persistent id of torch.save stands for.

    That is a storage: ("storage", type, key, location, number of elements), in the old format with
    a sixth part, which is None or the key, start and length of a view. Or, in the old format, a
    module's class: ("module", class, file, source text).
    """
    if isinstance(pid, tuple) and len(pid) == 4 and isinstance(pid[1], Global):
        return pid[1]
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise Damaged("a reference to something else than a storage")
    _, storage_type, key, _, numel, *view = pid
    if not isinstance(storage_type, Global):
        raise Damaged("a storage without a type")
    dtype = _STORAGE_TYPES.get((storage_type.module, storage_type.name))
    if dtype is None:
        raise Refused(
            f"it holds a {storage_type.label}, and {READ} are read. Convert its tensors with "
            ".dequantize() or .float(), where it was made"
        )
    start = 0
    if view and isinstance(view[0], tuple) and len(view[0]) == 3:
        start = view[0][1]
    if type(key) is not str or type(numel) is not int or type(start) is not int or start < 0:
        raise Damaged("a storage without a key or a length")
    return StoredStorage(key, dtype, numel, start)


# --- torch.save's format until torch 1.5, which a tensor's storage in a plain pickle still has

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_legacy(
    file: BoundedFile, budget: Budget, foreign: set[str], is_nested: bool = False
) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read what follows the magic number in a file of torch.save's old format.

    Pickles of a version, of facts about the machine, of the object, and of the storages' keys;
    then, in the keys' order, each storage's number of elements (8 bytes) and its elements.

    Returns:
        The object, and where each storage lies: key -> position and length in bytes.
    """
    if unpickle(file, budget, foreign) != _LEGACY_PROTOCOL:
        raise Damaged(f"a version of torch's old format that is not {_LEGACY_PROTOCOL}")
    machine = unpickle(file, budget, foreign)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused(
            "its numbers are in big-endian byte order. Load it on the machine that wrote it, and "
            "save it again with a new version of torch, which notes the order"
        )
    claimed: dict[str, StoredStorage] = {}

    def persistent(pid: Any) -> StoredStorage | Global:
        value = persistent_storage(pid)
        if isinstance(value, StoredStorage):
            claimed.setdefault(value.key, value)
        return value

    value = unpickle(file, budget, foreign, persistent, is_nested)
    keys = unpickle(file, budget, foreign)
    if not isinstance(keys, list):
        raise Damaged("no list of its storages")
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key not in claimed or key in found:
            raise Damaged("a storage that no tensor has, or twice the same")
        length = int.from_bytes(file.read(8), "little") * claimed[key].dtype.itemsize
        found[key] = file.tell(), length
        file.skip(length)
    return value, found


# --- what is written down for each function


def _rebuild(machine: Unpickler, function: Global, arguments: tuple) -> Any:
    name = (_PYTHON_2_MODULES.get(function.module, function.module), function.name)
    if name in _UNREADABLE:
        raise Refused(
            f"it holds {_UNREADABLE[name]}, and only dense tensors with values are read. Convert "
            "it to an ordinary tensor, where it was made"
        )
    build = _BUILDERS.get(name)
    if build is None:
        return machine.placeholder(function)
    if arguments and isinstance(arguments[0], Placeholder):
        return arguments[0]  # a list of what a foreign function gives, and the like
    return build(machine, *arguments)


def _rebuild_nested(machine: Unpickler, function: Global, arguments: tuple) -> Any:
    """In a storage within a pickle, where there is a storage and nothing else."""
    raise Damaged("a storage that holds other things")


def _tensor(
    machine: Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> StoredTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2 (gradient, hooks, flags)."""
    return _typed_tensor(machine, storage, offset, size, stride, None, None, None, *rest[2:])


def _typed_tensor(
    machine: Unpickler,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _requires_grad: Any,
    _hooks: Any,
    dtype: Any,
    flags: Any = None,
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3, of dtypes that have no storage type of their own."""
    if not isinstance(storage, StoredStorage):
        raise Damaged("a tensor without a storage")
    stored = storage.dtype if dtype is None else torch_dtype(dtype)
    if stored not in READABLE_DTYPES:
        name = dtype.label if isinstance(dtype, Global) else "an unknown dtype"
        raise Refused(
            f"it holds a tensor of {name}, and {READ} are read. Convert it with .float(), where "
            "it was made"
        )
    if isinstance(flags, dict) and any(value is not False for value in flags.values()):
        raise Refused("it holds a conjugated or negated view. Save its .clone(), where it was made")
    return StoredTensor(storage, offset, size, stride, stored)


def _parameter(machine: Unpickler, data: Any, *_: Any) -> Any:
    if not isinstance(data, StoredTensor):
        raise Damaged("a parameter without a tensor")
    return data


def _tensor_with_attributes(
    machine: Unpickler, function: Any, cls: Any, arguments: Any, *_: Any
) -> Any:
    """torch._tensor._rebuild_from_type_v2: of a subclass, or with attributes (dropped here)."""
    if not isinstance(cls, Global):
        raise Damaged("a tensor without a class")
    plain = {("torch", "Tensor"), ("torch._tensor", "Tensor"), ("torch.nn.parameter", "Parameter")}
    if (cls.module, cls.name) not in plain:
        return machine.placeholder(cls)
    if not isinstance(function, Global) or function.module != "torch._utils":
        raise Damaged("a tensor that something else than torch builds")
    return machine.call(function, arguments)


def _embedded_storage(machine: Unpickler, data: Any) -> StoredStorage:
    """torch.storage._load_from_bytes: how a tensor is in a pickle that torch.save did not write."""
    if not isinstance(data, bytes):
        raise Damaged("a storage without bytes")
    file, budget, foreign = BoundedFile(io.BytesIO(data), len(data)), machine.budget, set()
    if unpickle(file, budget, foreign, is_nested=True) != LEGACY_MAGIC:
        raise Damaged("a storage in an unknown format")
    storage, found = read_legacy(file, budget, foreign, is_nested=True)
    if not isinstance(storage, StoredStorage) or storage.key not in found:
        raise Damaged("a storage without its elements")
    position, length = found[storage.key]
    view = memoryview(data)[position : position + length]
    return StoredStorage(storage.key, storage.dtype, storage.numel, storage.start, view)


def _array(machine: Unpickler, cls: Any, *_: Any) -> Any:
    """numpy's _reconstruct: an empty array, whose state follows."""
    if not isinstance(cls, Global):
        raise Damaged("an array without a class")
    if (cls.module, cls.name) != ("numpy", "ndarray"):
        return machine.placeholder(cls)
    return StoredArray()


def _array_of_buffer(
    machine: Unpickler, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None
) -> StoredArray:
    """numpy's _frombuffer, of pickle protocol 5."""
    if order not in ("C", "F") or axes is not None:
        raise Refused(
            "it holds an array with permuted axes. Save numpy.ascontiguousarray of it, where it "
            "was made"
        )
    return StoredArray(dtype, shape, order, data)


def _scalar(machine: Unpickler, dtype: Any, data: Any = b"") -> StoredArray:
    return StoredArray(dtype, (), "C", data, is_scalar=True)


def _dtype(machine: Unpickler, code: Any, *_: Any) -> StoredDtype:
    if isinstance(code, Global):  # of another library; named if an array has it
        return StoredDtype(code.label)
    if type(code) is not str:
        raise Damaged("a dtype without a code")
    return StoredDtype(code)


def _encode(machine: Unpickler, text: Any, encoding: Any) -> bytes:
    """_codecs.encode: how the bytes of Python 3 are in pickles of protocol 2."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes that are not written as latin-1")
    machine.budget.spend(len(text))
    return text.encode("latin-1")


def _bytes(machine: Unpickler, data: Any = b"") -> bytes:
    if not isinstance(data, (bytes, bytearray)):
        raise Damaged(f"bytes made of a {type(data).__name__}")
    return data


def _dict(machine: Unpickler, items: Any = ()) -> dict:
    if not isinstance(items, (dict, list, tuple)):
        raise Damaged(f"a dict made of a {type(items).__name__}")
    machine.budget.spend(_ELEMENT * len(items))
    content: dict = {}
    for key, value in items.items() if isinstance(items, dict) else items:
        content[checked_key(key)] = value
    return content


def _default_dict(machine: Unpickler, _factory: Any = None, items: Any = ()) -> dict:
    return _dict(machine, items)


def _container(kind: type, is_hashed: bool) -> Callable[..., Any]:
    def build(machine: Unpickler, items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise Damaged(f"a {kind.__name__} made of a {type(items).__name__}")
        machine.budget.spend(_ELEMENT * len(items))
        return kind(map(checked_key, items) if is_hashed else items)

    return build


def _complex(machine: Unpickler, real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Damaged("a complex number of other parts than floats")
    return complex(real, imaginary)


def _device(machine: Unpickler, kind: Any, index: Any = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Damaged("a device without a name")
    return kind if index is None else f"{kind}:{index}"


def _object(machine: Unpickler, cls: Any, _base: Any = None, items: Any = None, *_: Any) -> Any:
    """copyreg._reconstructor: any object, in protocols 0 and 1; of a dict's kind with its items."""
    if not isinstance(cls, Global):
        raise Damaged("an object without a class")
    placeholder = machine.placeholder(cls)
    placeholder.note(items.items() if isinstance(items, dict) else ())
    return placeholder


_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
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
    ("numpy", "dtype"): _dtype,
    **{
        (f"numpy.{core}.{module}", name): build
        for core in ("core", "_core")  # of numpy 1 and 2
        for module, name, build in (
            ("multiarray", "_reconstruct", _array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _object,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "dict"): _dict,
    ("builtins", "list"): _container(list, is_hashed=False),
    ("builtins", "tuple"): _container(tuple, is_hashed=False),
    ("builtins", "set"): _container(set, is_hashed=True),
    ("builtins", "frozenset"): _container(frozenset, is_hashed=True),
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
}
_UNREADABLE = {
    ("torch._utils", name): what
    for name, what in {
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_sparse_csr_tensor": "a sparse tensor",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_qtensor": "a quantized tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no values",
        "_rebuild_wrapper_subclass": "a tensor that wraps others (DTensor and the like)",
        "_rebuild_device_tensor_from_numpy": "a tensor of another kind of device (XLA, ...)",
        "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another kind of device (XLA, ...)",
    }.items()
}
