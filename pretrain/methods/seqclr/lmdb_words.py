"""Words in LMDBs, as the benchmarks of scene-text recognition are passed around.

The layout of clovaai/deep-text-recognition-benchmark: `num-samples` (digits), and from 1 on
`image-%09d` (an encoded image) and `label-%09d` (UTF-8), which sets without labels lack, or fill
with a phrase that says so.
"""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.records import PackedText, Records, offsets, pack_ids
from virtex_d2.engine.errors import InputError

if TYPE_CHECKING:
    import lmdb

_NO_LABEL = "unlabeleddata"  # letters of what stands in the place of a label


@dataclass(frozen=True, slots=True)
class LmdbImage:
    """An encoded image in an LMDB."""

    folder: str
    key: str

    def open(self) -> io.BytesIO:
        with _environment(self.folder).begin(buffers=False) as transaction:
            found = transaction.get(self.key.encode())
        if found is None:
            raise OSError(f"the LMDB has no {self.key}")
        return io.BytesIO(found)


class LmdbRecords(Records):
    """Records whose roots are LMDBs, and whose names are keys in them."""

    def content(self, root: str, index: int) -> LmdbImage:
        return LmdbImage(root, self.names[index])


def find_databases(folder: str) -> list[str]:
    """The folders with a data.mdb within a folder, itself included; sorted."""
    return sorted(at for at, _, files in os.walk(folder, followlinks=True) if "data.mdb" in files)


def read_lmdb(folder: str) -> LmdbRecords:
    """Read the labels of an LMDB, and see that it is whole."""
    folder = os.path.realpath(folder)  # under two names it would be opened twice
    environment = _environment(folder)
    with environment.begin() as transaction:
        told = transaction.get(b"num-samples")
        if told is None or not told.isdigit():
            found = "none" if told is None else repr(told[:20])
            raise InputError(
                f"{folder}: expected the number of words under the key num-samples, found {found}. "
                "It is an LMDB of another kind, or was cut short while it was made."
            )
        count = int(told)
        # bounded by what is there: a damaged number would ask for all memory
        present = np.zeros(min(count, environment.stat()["entries"]) + 1, bool)
        labels = {}
        for key, _ in _below(transaction, b"image-", values=False):
            present[number if (number := _number(key)) < len(present) else 0] = True
        for key, value in _below(transaction, b"label-", values=True):
            labels[_number(key)] = value
    images = int(present[1:].sum())
    if images < count or not count:
        first = "" if present[1:].all() else f" (image-{present[1:].argmin() + 1:09d} is missing)"
        raise InputError(
            f"{folder}: num-samples is {count}, and there are {images} of these images{first}. The "
            "LMDB is cut short, or empty: copy or make it again."
        )
    texts = [_label(folder, number, labels.get(number, b"")) for number in range(1, count + 1)]
    keys = [f"image-{number:09d}" for number in range(1, count + 1)]
    return LmdbRecords(
        pack_ids(keys),
        PackedText.pack(keys),
        PackedText.pack(text for text in texts if text),
        offsets(np.array([bool(text) for text in texts], np.int64)),
        PackedText.pack([folder]),
    )


def _below(
    transaction: "lmdb.Transaction", prefix: bytes, values: bool
) -> Iterator[tuple[bytes, bytes]]:
    """Keys that begin so, and their values where these are asked for."""
    cursor = transaction.cursor()
    if cursor.set_range(prefix):
        for item in cursor.iternext(keys=True, values=values):
            key, value = item if values else (item, b"")
            if not key.startswith(prefix):
                return
            yield key, value


def _number(key: bytes) -> int:
    digits = key.partition(b"-")[2]
    return int(digits) if digits.isdigit() else 0


def _label(folder: str, number: int, value: bytes) -> str:
    """The label; "" where there is none."""
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{folder}: label-{number:09d} is no UTF-8: {value[:40]!r}. Make the LMDB again from "
            "texts."
        ) from error
    nothing = re.sub("[^a-z]", "", text.lower()) == _NO_LABEL
    return "" if nothing else text.strip()


# By folder, what this process has opened. An LMDB may be open once in a process, and what was
# opened before a fork is not for the child, which opens its own.
_open: dict[str, "lmdb.Environment"] = {}


def _close_all() -> None:
    while _open:
        _open.popitem()[1].close()


os.register_at_fork(after_in_child=_close_all)


def _environment(folder: str) -> "lmdb.Environment":
    """The LMDB, open for reading."""
    if folder not in _open:
        _open[folder] = _opened(folder)
    return _open[folder]


def _opened(folder: str) -> "lmdb.Environment":
    lmdb = _import_lmdb()
    path = os.path.join(folder, "data.mdb")
    try:
        environment = lmdb.open(
            folder, readonly=True, lock=False, readahead=False, meminit=False, create=False
        )
        # pages that a file lacks are mapped all the same, and reading one ends the process
        whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise InputError(
            f"{path}: cannot be read as an LMDB: {error}. Copy it again, or make it anew."
        ) from error
    size = os.path.getsize(path)
    if size < whole:
        environment.close()
        raise InputError(
            f"{path}: is cut short: it says that it has {whole} bytes, and has {size}. Copy it "
            "again."
        )
    return environment


def _import_lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError as error:
        raise InputError(
            "Reading LMDBs needs the package lmdb, which is not installed: pip install -r "
            "requirements-words.txt."
        ) from error
    return lmdb
