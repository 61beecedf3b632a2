"""Tar shards as records, in the layout of img2dataset and WebDataset: KEY.jpg, KEY.txt, KEY.json.

Members that lie side by side and share what comes before the first dot of their name are a sample.
Its captions are the lines of KEY.txt; without one, `caption` of KEY.json, or what
DATA.CAPTION_KEY names there. Shards come from the web: a sample that cannot be used is passed over
and counted, not refused.

An index makes shards on the disk random-access. It is made once, by reading the shards' headers and
texts, and kept as one file: arrays in safetensors, beside them the shards' sizes and times of
change, by which it is known to be stale. Shards that come from pipes are read by
`pretrain.data.lanes`.
"""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from webdataset.gopen import gopen, set_options
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from pretrain.data.records import (
    PackedText,
    Records,
    captions_in_text,
    offsets,
    pack_ids,
    text_lines,
)
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors
from virtex_d2.engine.images import IMAGE_SUFFIXES, image_suffix

logger = logging.getLogger(__name__)

_FORMAT = "pretrain.shard_index"
_VERSION = "2"
_BLOCK = 512  # bytes; a tar ends with two blocks of zeros (POSIX.1-2001, pax)
# What stops a run is no concern of a command that it reads from: a schedulers' signals go to all.
_IGNORE_SIGNALS = "trap '' USR1 TERM INT; "

Content = TypeVar("Content")
# Name and reason of samples and shards that cannot be used.
Skipped = list[tuple[str, str]]


class Unusable(Exception):  # noqa: N818 - no error of the program: a sample to pass over
    """What is wrong with a sample or a shard."""


@dataclass
class Sample(Generic[Content]):
    """Members that lie side by side and whose names begin with `key`."""

    key: str
    parts: dict[str, Content] = field(default_factory=dict)  # by suffix: bytes, or where they are
    problem: str = ""  # why they cannot be told apart
    again: bool = False  # whether others of the key lie elsewhere in the shard


def is_pipe(captions: str) -> bool:
    """Whether shards come from commands ("pipe:cat a.tar") and so can be read forwards only."""
    return captions.startswith("pipe:")


def list_shards(captions: str) -> list[str]:
    """Name the shards.

    Args:
        captions: a folder of tars; a .txt file with a name a line; or names with braces such as
            shards/{00000..00099}.tar, several joined by "::".
    """
    if os.path.isdir(captions):
        names = sorted(name for name in os.listdir(captions) if name.lower().endswith(".tar"))
        shards = [os.path.join(captions, name) for name in names]
    elif captions.lower().endswith(".txt"):
        shards = [shard for _, line in text_lines(captions) for shard in _expand(line.strip())]
    else:
        shards = _expand(captions)
    if not shards:
        raise InputError(f"{captions}: expected tar shards in it, found none.")
    if remote := [shard for shard in shards if "://" in shard and not is_pipe(shard)]:
        raise InputError(
            f"{remote[0]}: expected a file or a pipe. Write 'pipe:curl -s -f -L {remote[0]}'."
        )
    if len({is_pipe(shard) for shard in shards}) > 1:
        raise InputError(f"{captions}: pipes and files cannot be mixed. Use 'pipe:cat FILE'.")
    return shards


def _expand(pattern: str) -> list[str]:
    try:
        return expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise InputError(f"{pattern}: the braces cannot be expanded: {error}.") from error


def group(members: Iterable[tuple[str, Content]]) -> Iterator[Sample[Content]]:
    """Group (name, content) of members to samples; an image or a text whose suffix stands behind a
    further dot is one of its own, with that problem.

    Raises:
        Unusable: at the end, as the members do; the sample that it ends in is left out.
    """
    sample: Sample[Content] | None = None
    strays: dict[str, Sample[Content]] = {}  # by what would be their key
    seen = set()

    def finished() -> Iterator[Sample[Content]]:
        if sample and sample.parts:
            yield sample
        yield from strays.values()
        strays.clear()

    try:
        for name, content in members:
            base, suffix = base_plus_ext(name)
            if base is None or os.path.basename(base).startswith("__"):  # metadata of the shard
                continue
            if sample is None or base != sample.key:
                yield from finished()
                sample = Sample(base, again=base in seen)
                seen.add(base)
            suffix = suffix.lower()
            longer, _, last = suffix.rpartition(".")
            if longer and (image_suffix(last) or last == "txt"):
                problem = f"only the first dot of {name} parts its key from its suffix: rename it"
                strays.setdefault(longer, Sample(f"{base}.{longer}", problem=problem))
            elif suffix in sample.parts:
                sample.problem = f"it has two members {name}"
            else:
                sample.parts[suffix] = content
    except Unusable as error:
        raise Unusable(f"{error}, in or after {sample.key}" if sample else str(error)) from error
    yield from finished()


def contents_of(
    sample: Sample[Content], read: Callable[[Content], bytes], caption_key: str = ""
) -> tuple[str, Content, list[str]]:
    """Return suffix and content of a sample's image, and its captions, at least one; `read` gives a
    member's bytes, `caption_key` names the captions in its JSON ("" is "caption").

    Raises:
        Unusable: it lacks an image or a text, its captions are not UTF-8, or it has a problem.
    """
    if sample.problem:
        raise Unusable(sample.problem)
    parts = sample.parts
    try:
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        if suffix is None:
            raise Unusable(f"it has no image, only {', '.join(parts)}")
        return suffix, parts[suffix], _captions_of(parts, read, caption_key or "caption")
    except Unusable as error:
        if sample.again:
            raise Unusable(
                f"{error}; others of its key lie elsewhere in the shard, and a sample's members "
                "must lie side by side: write it with tar --sort=name"
            ) from error
        raise


def _captions_of(
    parts: dict[str, Content], read: Callable[[Content], bytes], key: str
) -> list[str]:
    try:
        if "txt" in parts:
            captions = captions_in_text(read(parts["txt"]).decode("utf-8-sig"))
        elif "json" in parts:
            captions = _captions_in_json(json.loads(read(parts["json"]).decode("utf-8-sig")), key)
        else:
            raise Unusable(f"it has no text, only {', '.join(parts)}")
    except UnicodeDecodeError as error:
        raise Unusable("its text is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Unusable("its .json is not JSON") from error
    if not captions:
        raise Unusable("its caption is blank")
    return captions


def _captions_in_json(content: Any, key: str) -> list[str]:
    if not isinstance(content, dict) or key not in content:
        has = f"only {', '.join(content)}" if isinstance(content, dict) and content else "no keys"
        raise Unusable(f"its .json has no `{key}`, {has} (DATA.CAPTION_KEY names which to read)")
    found = content[key]
    texts = found if isinstance(found, list) else [found]
    if others := [text for text in texts if not isinstance(text, str | None)]:
        raise Unusable(f"`{key}` in its .json is {json.dumps(others[0])[:40]}, no text")
    return [text.strip() for text in texts if text and text.strip()]


def file_members(shard: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (offset, size)) of the files in a shard on the disk, whole ones only.

    Raises:
        Unusable: at the end: the shard is cut short or no tar.
    """
    with open(shard, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # it keeps every header otherwise
                    if member.offset_data + member.size > size:
                        raise Unusable("it is cut short")
                    if member.isreg():
                        yield member.name, (member.offset_data, member.size)
                file.seek(tar.offset)
        except (tarfile.TarError, EOFError) as error:
            raise Unusable(f"it is cut short or not a plain tar ({error})") from error
        # tarfile takes damage between members for the end
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise Unusable("it is cut short")


def stream_members(shard: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files in a shard that is piped, whole ones only.

    Raises:
        Unusable: at the end: it is cut short, no tar, or its command has failed.
    """
    pipe = gopen(shard.replace("pipe:", f"pipe:{_IGNORE_SIGNALS}", 1))
    # a command's failure is asked for after its last byte: earlier, it would depend on timing how
    # many samples were seen
    set_options(pipe, ignore_errors=True)
    tail = _Tail(pipe)
    try:
        with tarfile.open(fileobj=tail, mode="r|") as tar:
            for member in tar:
                tar.members = []
                if member.isreg():
                    content = tar.extractfile(member).read()
                    if len(content) < member.size:
                        raise Unusable("it is cut short")
                    yield member.name, content
        while tail.read(1 << 20):
            pass
        if (status := pipe.proc.wait()) != 0:
            raise Unusable(f"its command failed with exit code {status}")
        if tail.last != bytes(_BLOCK):
            raise Unusable("it is cut short")
    except (tarfile.TarError, EOFError) as error:
        status = pipe.proc.wait() if tail.ended else 0
        failed = f"; its command failed with exit code {status}" if status else ""
        raise Unusable(f"it is cut short or not a plain tar ({error}){failed}") from error
    finally:
        pipe.close()


class _Tail:
    """A stream that remembers its last block, and whether it has come to its end."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.last = b""
        self.ended = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.last = (self.last + data)[-_BLOCK:]
        self.ended = self.ended or not data
        return data


def load_shards(
    captions: str, index_dir: str | os.PathLike, max_skipped_share: float, caption_key: str = ""
) -> Records:
    """Index tar shards on the disk; records are in the shards' order; the id is the sample's key.

    Args:
        captions: which shards: see `list_shards`.
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
    """Index every shard's members: headers of all, contents of texts."""
    ids, names, captions, counts, root_of, spans = [], [], [], [], [], []
    skipped: Skipped = []
    for number, shard in enumerate(shards):
        try:
            with open(shard, "rb") as file:

                def read(span: tuple[int, int], file=file) -> bytes:
                    file.seek(span[0])
                    return file.read(span[1])

                for sample in group(file_members(shard)):
                    try:
                        suffix, span, texts = contents_of(sample, read, caption_key)
                    except Unusable as error:
                        skipped.append((f"{shard}/{sample.key}", str(error)))
                        continue
                    ids.append(sample.key)
                    names.append(f"{sample.key}.{suffix}")
                    captions += texts
                    counts.append(len(texts))
                    root_of.append(number)
                    spans.append(span)
        except Unusable as error:  # at its end: the shard is cut short
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
