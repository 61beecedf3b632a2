"""Thousands of broken files: each is read or refused, and none runs anything.

VIRTEX_FUZZ=20000 sets the number of files of the fast test; VIRTEX_FUZZ_SEED another start.
"""

import argparse
import contextlib
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import time
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import yacs.config
from safetensors.torch import save

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.safe_load import read_tensors

# Of pickletools, in the mutations.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

# What code in a file would do, by the names of Python's audit events.
FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.find_class", "exec", "compile",
    "import", "marshal.", "code.__new__", "object.__setattr__", "builtins.", "webbrowser.",
)  # fmt: skip
_watch = {"is_on": False, "seen": []}


def _audit(event, arguments):
    if not _watch["is_on"]:
        return
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN):
        _watch["seen"].append((event, repr(arguments)[:200]))


@pytest.fixture(scope="module")
def watch():
    """Lists what happens in the process while `_watch` is on. Audit hooks cannot be removed."""
    sys.addaudithook(_audit)
    return _watch["seen"]


# --- small files of every format, some of them with code in them


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def seeds(command):
    weight = torch.arange(6.0).reshape(2, 3)
    arrays = {
        "conv1_w": np.arange(4, dtype=np.float32),
        "F": np.asfortranarray(np.ones((2, 2), ">i2")),
        "lr": np.float64(0.5),
        "s": {1, (2, "a")},
        "names": np.array(["a"]),
    }
    tensors = OrderedDict(w=weight, t=weight.T, h=weight.half()[:, 1:], n=torch.tensor(3))
    tensors["p"] = torch.nn.Parameter(weight[0])
    foreign = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "cfg": yacs.config.CfgNode({"A": {"B": 1}}),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "u": torch.ones(2).to(torch.uint16),
        "lrs": [0.1, 1, 2**70, None, True, b"b", "ü", 1j],
    }
    content = {"model": tensors, **foreign, "arrays": arrays}
    files = {f"pickle{p}": pickle.dumps({"blobs": arrays, "w": weight}, p) for p in range(6)}
    for protocol in (2, 4):
        options = {"pickle_protocol": protocol}
        files[f"zip{protocol}"] = torch_bytes(content, **options)
        options["_use_new_zipfile_serialization"] = False
        files[f"legacy{protocol}"] = torch_bytes(content, **options)
    files["safetensors"] = save({"w": weight, "h": weight.half(), "n": torch.tensor(1)}, {"a": "b"})
    argument = b"X" + struct.pack("<I", len(command)) + command.encode()
    evil = {
        b"cos\nsystem\n" + argument + b"\x85R",
        b"(" + argument + b"ios\nsystem\n",
        b"(cposix\nsystem\n" + argument + b"o",
        b"cargparse\nNamespace\n)\x81}X\x0c\0\0\0__setstate__cos\nsystem\nsb" + argument + b"b",
        b"cbuiltins\neval\nX\x0b\0\0\0__import__\x20\x85R",
        b"cbuiltins\ntuple\ncbuiltins\nmap\n(cos\nsystem\n(" + argument + b"lt\x81\x85\x81",
    }
    for index, instructions in enumerate(sorted(evil)):
        pickled = files["pickle3"][:-2] + b"X\1\0\0\0x" + instructions + b"u."
        files[f"evil pickle{index}"] = pickled
        members = unpacked(files["zip2"])
        inner = members["archive/data.pkl"]
        members["archive/data.pkl"] = inner[:-2] + b"X\1\0\0\0x" + instructions + b"u."
        files[f"evil zip{index}"] = packed(members)
    return files


def unpacked(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


# --- mutations

NUMBERS = [
    struct.pack(code, number)
    for code in ("<B", "<H", "<I", "<Q")
    for number in (0, 1, 0x7F, 0xFF, 2 ** (8 * struct.calcsize(code)) - 1)
    if number < 2 ** (8 * struct.calcsize(code))
]
INSTRUCTIONS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
WORDS = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"cbuiltins\nset\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"ctorch\ndevice\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.storage\n_load_from_bytes\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nfloat64\n", b"ccopyreg\n_reconstructor\n",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x01\xff", b"I-1\n", b"F1e308\n", b"S'a'\n",
    b"X\x07\0\0\0storage", b"U\x02f4", b"C\x04abcd", b"K\x05", b"\x8d" + b"\xff" * 8,
    b"r\xff\xff\xff\x7f", b"j\0\0\0\0", b"h\0", b"q\0", b"\x85R", b")R", b"}b", b"}\x92",
]  # fmt: skip


def flip(rng, data, _):
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng, data, _):
    number = rng.choice(NUMBERS)
    start = rng.randrange(len(data))
    data[start : start + len(number)] = number


def insert(rng, data, _):
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice((rng.randbytes(rng.randint(1, 20)), rng.choice(WORDS)))


def delete(rng, data, _):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 8, 100))]


def repeat(rng, data, _):
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 60)]
    data[start:start] = piece * rng.choice((1, 2, 50))


def splice(rng, data, other):
    start = rng.randrange(len(other))
    data[rng.randrange(len(data)) :] = other[start:]


def truncate(rng, data, _):
    del data[rng.randrange(len(data)) :]


BYTE_MUTATIONS = (flip, overwrite, insert, delete, repeat, splice, truncate)


def mutate_instructions(rng, pickled):
    """Of a whole pickle: some instructions removed, doubled, moved, replaced, or put in."""
    with contextlib.suppress(Exception):  # what an earlier mutation has broken is left as it is
        starts = [position for _, _, position in pickletools.genops(bytes(pickled))]
        ends = starts[1:] + [len(pickled)]
        pieces = [bytes(pickled[start:end]) for start, end in zip(starts, ends)]
        for _ in range(rng.choice((1, 1, 1, 5))):
            index, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
            kind = rng.randrange(6)
            if kind == 0:
                del pieces[index]
            elif kind == 1:
                pieces.insert(index, pieces[other])
            elif kind == 2:
                pieces[index], pieces[other] = pieces[other], pieces[index]
            elif kind == 3:
                pieces[index] = rng.choice(INSTRUCTIONS) + pieces[index][1:]
            elif kind == 4:
                pieces.insert(index, rng.choice(WORDS))
            else:
                pieces.insert(index, rng.choice(INSTRUCTIONS))
        pickled[:] = b"".join(pieces)


def mutated(rng, files):
    """A broken file: its name, and its bytes."""
    name = rng.choice(list(files))
    data, other = bytearray(files[name]), files[rng.choice(list(files))]
    # Inside of an archive that is whole again, so that more than its checksums meets the damage.
    is_inside = "zip" in name and rng.random() < 0.7
    members = unpacked(data) if is_inside else {}
    if is_inside:
        member = "archive/data.pkl" if rng.random() < 0.8 else rng.choice(list(members))
        data = bytearray(members[member]) or bytearray(1)
    is_pickle = (is_inside and member.endswith(".pkl")) or "pickle" in name
    for _ in range(rng.choice((1, 1, 1, 2))):
        if is_pickle and rng.random() < 0.6:
            mutate_instructions(rng, data)
        elif data:
            rng.choice(BYTE_MUTATIONS)(rng, data, other)
    if is_inside:
        members[member] = bytes(data)
        return name, packed(members)
    return name, bytes(data)


def read_mutants(count, folder, watched):
    canary = folder / "canary"
    files = seeds(f"mkdir {canary}")
    path = folder / "model.pth"
    results = Counter()
    for content in files.values():  # warm, so that lazy imports are done; all are read or refused
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            read_tensors(path)
    rng = random.Random(int(os.environ.get("VIRTEX_FUZZ_SEED", "0")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        name, content = mutated(rng, files)
        path.write_bytes(content)
        del watched[:]
        started = time.process_time()
        _watch["is_on"] = True
        try:
            read = read_tensors(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)  # noqa: PT017, PT018
            results["refused"] += 1
        else:
            assert all(map(is_plain, values_of(read.content)))
            results["read"] += 1
        finally:
            _watch["is_on"] = False
        # The processor's time, of which a file takes a millisecond: this is about those that hang.
        # A hang, not a matter of speed: a file takes milliseconds.
        assert time.process_time() - started < 30, f"{name}, as {path}"
        assert watched == [], f"{name}, as {path}"
        assert not canary.exists(), f"{name}, as {path}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 200, f"{grown} MiB more, for files of {max(map(len, files.values()))} bytes"
    return results


def values_of(content):
    inner = content.values() if isinstance(content, dict) else content
    for value in inner if isinstance(content, (dict, list, tuple)) else [content]:
        if isinstance(value, (dict, list, tuple)):
            yield from values_of(value)
        else:
            yield value


def is_plain(value):
    if isinstance(value, torch.Tensor):
        has_no_gaps = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return has_no_gaps and value.device.type == "cpu" and value.sum() is not None
    kinds = ("NoneType", "bool", "int", "float", "complex", "str", "bytes", "set", "Placeholder")
    return type(value).__name__ in kinds


def test_mutated_files_are_read_or_refused(tmp_path, watch):
    count = int(os.environ.get("VIRTEX_FUZZ", "400"))
    results = read_mutants(count, tmp_path, watch)
    # Both happen, so the mutations are neither too small nor too large to say something.
    assert min(results["read"], results["refused"]) > count // 50, results


@pytest.mark.slow
def test_20000_mutated_files_are_read_or_refused(tmp_path, watch, monkeypatch):
    monkeypatch.setenv("VIRTEX_FUZZ_SEED", "1")
    results = read_mutants(20_000, tmp_path, watch)
    assert min(results.values()) > 1000, results
    print(dict(results))


def test_the_watch_sees_what_code_in_a_file_would_do(tmp_path, watch):
    # What the other tests rely on: the same file, opened by pickle.
    content = seeds(f"mkdir {tmp_path / 'canary'}")["evil pickle0"]
    del watch[:]
    _watch["is_on"] = True
    try:
        with contextlib.suppress(Exception):
            pickle.loads(content)
    finally:
        _watch["is_on"] = False
    assert {"pickle.find_class", "os.system"} <= {event for event, _ in watch}
