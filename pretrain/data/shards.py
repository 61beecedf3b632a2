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

from pretrain.data.records import PackedText, Records, offsets, pack_ids
from pretrain.data.tars import Unusable, contents_of, file_members, group, is_pipe, list_shards
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

_FORMAT = "pretrain.shard_index"
_VERSION = "2"

# Name and reason of samples and shards that cannot be used.
Skipped = list[tuple[str, str]]


def load_shards(
    captions: str, index_dir: str | os.PathLike, max_skipped_share: float, caption_key: str = ""
) -> Records:
    """Records of tar shards, in the shards' order; the id is the sample's key.

    Args:
        captions: which shards: see `list_shards`.
        index_dir: where the index is, or is written.
        max_skipped_share: the fraction of samples that may lack image or caption, or be cut off.
        caption_key: of the captions in samples' JSON; "" is "caption".
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
    stamp = json.dumps([[shard, *_size_and_time(shard)] for shard in shards] + [caption_key])
    path = index_path(shards, index_dir)
    found = _read_index(path, stamp)
    if found is None:
        found = _read_shards(shards, caption_key)
        _write_index(path, stamp, *found)
        logger.info("Wrote the index of %d shards to %s.", len(shards), path)
    records, skipped = found
    _report(captions, shards, skipped, len(records), max_skipped_share)
    return records


def index_path(shards: list[str], index_dir: str | os.PathLike) -> str:
    """The index of these shards: sets of shards in one folder do not disturb each other."""
    name = hashlib.sha256("\n".join(shards).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return os.path.join(index_dir, f"shards-{name}.index.safetensors")


def _size_and_time(shard: str) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise InputError(
            f"{shard}: expected a tar shard: {error.strerror}. Check the pattern, or download it "
            "again."
        ) from error
    return status.st_size, status.st_mtime_ns


def _read_shards(shards: list[str], caption_key: str) -> tuple[Records, Skipped]:
    """Every shard's members: headers of all, contents of texts."""
    ids, names, captions, counts, root_of, spans = [], [], [], [], [], []
    skipped: Skipped = []
    for number, shard in enumerate(shards):
        try:
            for key, suffix, span, texts in _usable_samples(shard, skipped, caption_key):
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
    shard: str, skipped: Skipped, caption_key: str
) -> Iterator[tuple[str, str, tuple[int, int], list[str]]]:
    """Key, image's suffix and span, and captions of samples; the others are added to `skipped`.

    Raises:
        Unusable: at the end: the shard is cut short.
    """
    with open(shard, "rb") as file:

        def read(span: tuple[int, int]) -> bytes:
            file.seek(span[0])
            return file.read(span[1])

        for sample in group(file_members(shard)):
            try:
                suffix, span, captions = contents_of(sample, read, caption_key)
            except Unusable as error:
                skipped.append((f"{shard}/{sample.key}", str(error)))
            else:
                yield sample.key, suffix, span, captions


def _report(
    captions: str, shards: list[str], skipped: Skipped, num_usable: int, max_skipped_share: float
) -> None:
    for name, reason in skipped:
        logger.warning("%s is skipped: %s.", name, reason)
    total = num_usable + len(skipped)
    if len(skipped) > max_skipped_share * total or not num_usable:
        kinds = {entry[1]: entry for entry in reversed(skipped)}  # the first of each reason
        named = sorted(skipped, key=lambda entry: kinds[entry[1]] is not entry)
        first = "; ".join(f"{name}: {reason}" for name, reason in named[:10])
        limit = ""
        if num_usable:
            limit = f", a larger share than DATA.MAX_SKIPPED_SHARE {max_skipped_share}"
            advice = "Download or write the shards again, or raise DATA.MAX_SKIPPED_SHARE."
        elif all(name in shards for name, _ in skipped):
            advice = "Are these uncompressed tar shards? DATA.FORMAT or DATA.VAL_FORMAT says so."
        else:
            advice = "A sample is KEY.jpg and KEY.txt or KEY.json, side by side in the shard."
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
