"""Tar shards on the disk as records: an index of their members makes them random-access.

The index is made once, by reading the shards' headers and texts, and kept as one file: arrays in
safetensors, beside them the shards' sizes and times of change, by which it is known to be stale.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_safetensors, write_safetensors

from .records import PackedText, Records, offsets, pack_ids
from .tars import Unusable, captions_of, file_members, group, image_of, is_pipe, list_shards

logger = logging.getLogger(__name__)

_FORMAT = "pretrain.shard_index"
_VERSION = "1"

# Name and reason of samples and shards that cannot be used.
Skipped = list[tuple[str, str]]


def load_shards(captions: str, index_dir: str | os.PathLike, max_skipped_share: float) -> Records:
    """Records of tar shards, in the shards' order; the id is the sample's key.

    Args:
        captions: which shards: see `list_shards`.
        index_dir: where the index is, or is written.
        max_skipped_share: the fraction of samples that may lack image or caption, or be cut off.

    Raises:
        InputError: there is no shard, one is missing, or more than that fraction is unusable.
    """
    shards = list_shards(captions)
    if is_pipe(shards[0]):
        raise InputError(
            f"{captions}: pipes are for training alone; validation counts every caption once. "
            "Download the shards."
        )
    shards = [os.path.abspath(shard) for shard in shards]
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise InputError(f"{captions}: the shard {repeated[0]} is named twice. Name it once.")
    stamp = json.dumps([[shard, *_size_and_time(shard)] for shard in shards])
    path = index_path(shards, index_dir)
    found = _read_index(path, stamp)
    if found is None:
        found = _read_shards(shards)
        _write_index(path, stamp, *found)
        logger.info("Wrote the index of %d shards to %s.", len(shards), path)
    records, skipped = found
    _report(captions, skipped, len(records), max_skipped_share)
    return records


def index_path(shards: list[str], index_dir: str | os.PathLike) -> str:
    """The index of these shards: sets of shards in one folder do not disturb each other."""
    name = hashlib.sha256("\n".join(shards).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return os.path.join(index_dir, f"shards-{name}.index.safetensors")


def _size_and_time(shard: str) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change.

    Raises:
        InputError: there is no such file.
    """
    try:
        status = os.stat(shard)
    except OSError as error:
        raise InputError(
            f"{shard}: expected a tar shard: {error.strerror}. Check the pattern, or download it "
            "again."
        ) from error
    return status.st_size, status.st_mtime_ns


def _read_shards(shards: list[str]) -> tuple[Records, Skipped]:
    """Every shard's members: headers of all, contents of texts."""
    ids, names, captions, counts, root_of, spans = [], [], [], [], [], []
    skipped: Skipped = []
    for number, shard in enumerate(shards):
        try:
            for key, suffix, span, texts in _usable_samples(shard, skipped):
                ids.append(key)
                names.append(f"{key}.{suffix}")
                captions += texts
                counts.append(len(texts))
                root_of.append(number)
                spans.append(span)
        except Unusable as error:
            skipped.append((shard, str(error)))
        except OSError as error:
            raise InputError(f"{shard}: cannot be read: {error.strerror}.") from error
    records = Records(
        pack_ids(ids) if ids else PackedText.pack([]),
        PackedText.pack(names),
        PackedText.pack(captions),
        offsets(counts),
        PackedText.pack(shards),
        np.array(root_of, np.int32),
        np.array(spans, np.int64).reshape(-1, 2),
    )
    return records, skipped


def _usable_samples(
    shard: str, skipped: Skipped
) -> Iterator[tuple[str, str, tuple[int, int], list[str]]]:
    """Key, image's suffix and span, and captions of samples; the others are added to `skipped`.

    Raises:
        Unusable: at the end: the shard is cut short.
    """
    with open(shard, "rb") as file:

        def read(span: tuple[int, int]) -> bytes:
            file.seek(span[0])
            return file.read(span[1])

        for key, parts in group(file_members(shard)):
            try:
                suffix, span = image_of(parts)
                captions = captions_of(parts, read)
            except Unusable as error:
                skipped.append((f"{shard}/{key}", str(error)))
            else:
                yield key, suffix, span, captions


def _report(captions: str, skipped: Skipped, num_usable: int, max_skipped_share: float) -> None:
    for name, reason in skipped:
        logger.warning("%s is skipped: %s.", name, reason)
    total = num_usable + len(skipped)
    if len(skipped) > max_skipped_share * total or not num_usable:
        first = "; ".join(f"{name}: {reason}" for name, reason in skipped[:10])
        if num_usable:
            limit = f", a larger share than DATA.MAX_SKIPPED_SHARE {max_skipped_share}"
            advice = "Download or write the shards again, or raise DATA.MAX_SKIPPED_SHARE."
        else:
            limit = ""
            advice = "Are these uncompressed tar shards? DATA.FORMAT or DATA.VAL_FORMAT says so."
        raise InputError(
            f"{captions}: {len(skipped)} of {total} samples cannot be used{limit}"
            + (f"; the first: {first}" if skipped else "")
            + f". {advice}"
        )


def _write_index(path: str, stamp: str, records: Records, skipped: Skipped) -> None:
    arrays = {"firsts": records.firsts, "root_of": records.root_of, "spans": records.spans}
    for name in ("ids", "names", "captions", "roots"):
        text = getattr(records, name)
        arrays[name], arrays[f"{name}.offsets"] = text.buffer, text.offsets
    # a copy: what frombuffer() gives is read-only, which torch warns of
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    metadata = {"format": _FORMAT, "format_version": _VERSION, "shards": stamp}
    write_safetensors(path, tensors, {**metadata, "skipped": json.dumps(skipped)})


def _read_index(path: str, stamp: str) -> tuple[Records, Skipped] | None:
    """None where there is no index, or one of shards as they were before, or of another make."""
    if not os.path.isfile(path):
        return None
    try:
        tensors, metadata = read_safetensors(path)
    except InputError:
        return None
    if (metadata.get("format_version"), metadata.get("shards")) != (_VERSION, stamp):
        return None
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    texts = {
        name: PackedText(arrays[name], arrays[f"{name}.offsets"])
        for name in ("ids", "names", "captions", "roots")
    }
    records = Records(
        **texts, firsts=arrays["firsts"], root_of=arrays["root_of"], spans=arrays["spans"]
    )
    return records, [tuple(entry) for entry in json.loads(metadata["skipped"])]
