"""Read and write tensors: files appear whole or not at all, and loading one never runs code."""

import hashlib
import json
import os
import pickle
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from virtex_d2.engine.atomic import TEMPORARY_PREFIX as TEMPORARY_PREFIX
from virtex_d2.engine.atomic import atomic_path
from virtex_d2.engine.checksum import damage
from virtex_d2.engine.errors import InputError


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write named tensors (any shape and device) and string metadata, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata))


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU by name, and the metadata ({} where none)."""
    require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: expected a safetensors file, but it is truncated or of another format "
            f"({error}). Copy or export it again."
        ) from error


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a torch checkpoint (.pth) onto the CPU; it may hold tensors and plain values only."""
    require_file(path)
    if found := damage(path):
        raise InputError(
            f"{path}: expected a torch checkpoint, but the file is truncated or damaged: {found}. "
            "Copy it again, or use an older one."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(_unpickling_message(path, str(error))) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise InputError(
            f"{path}: expected a torch checkpoint, but it is truncated or of another format "
            f"({reason}). Copy it again, or resume from an older one."
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(
            f"{path}: expected a checkpoint (a dict), found a {type(checkpoint).__name__}"
        )
    return checkpoint


def read_numpy_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """Read a .pkl of the detectron2 model zoo (numpy arrays by name, latin-1), and nothing else."""
    require_file(path)
    with open(path, "rb") as file:
        try:
            data = _NumpyUnpickler(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError) as error:
            raise InputError(
                f"{path}: expected a pickle of numpy arrays by name, but it is truncated or holds "
                f"something else ({error}). Nothing of it was loaded."
            ) from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a dict of arrays, found a {type(data).__name__}")
    return data


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


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# What rebuilds numpy arrays from a pickle, under numpy 1's and numpy 2's names.
_NUMPY_GLOBALS = (
    {
        (f"numpy{core}.multiarray", name)
        for core in (".core", "._core")
        for name in ("_reconstruct", "scalar")
    }
    | {(f"numpy{core}.numeric", "_frombuffer") for core in (".core", "._core")}
    | {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
    }
)


class _NumpyUnpickler(pickle.Unpickler):
    """Builds plain values and numpy arrays, and refuses every other name in the pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return super().find_class(module, name)


def _unpickling_message(path: str | os.PathLike, reason: str) -> str:
    refused = re.search(r"GLOBAL (\S+)", reason)
    if not refused:
        return f"{path}: expected a torch checkpoint, found something else. Is it the right file?"
    return (
        f"{path}: refused, because besides tensors it holds Python objects ({refused.group(1)}), "
        "and loading such a file can run any code. Save its state dict alone, where it was "
        "trained: torch.save({'model': model.state_dict()}, path)."
    )


def require_file(path: str | os.PathLike) -> None:
    """Raise InputError if there is no file, or a folder."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "nothing"
        raise InputError(f"{path}: expected a file, found {found} there. Check the path.")
