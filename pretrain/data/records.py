"""Records of images and their captions, packed in arrays.

A list of 118 000 records with 590 000 captions is some 700 000 Python objects. A data loader's
forked worker that reads them writes their reference counts, and so copies the pages that they lie
in: each worker ends with a list of its own. Arrays are read without being written.
"""

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a file: a member of a tar shard, offset and size in bytes."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One image and what people said of it.

    Attributes:
        image_id: as in the annotation file; the name or the key where the format has no ids.
        file_name: absolute path of the image, or `shard.tar/key.jpg`.
        captions: none of them blank; of images alone there are none.
        content: where a shard's image lies, or its bytes; None for a file of its own.
    """

    image_id: int | str
    file_name: str
    captions: tuple[str, ...]
    content: Span | bytes | None = None

    def image_file(self) -> str | io.BytesIO:
        """What the image can be decoded from: its path, or its bytes.

        Raises:
            OSError: the shard cannot be read.
        """
        if self.content is None:
            return self.file_name
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        with open(self.content.path, "rb") as shard:
            shard.seek(self.content.offset)
            return io.BytesIO(shard.read(self.content.size))


class PackedText(Sequence[str]):
    """Texts in one buffer, read one at a time.

    Args:
        buffer: (bytes,) uint8, the texts in UTF-8; halves of surrogate pairs, which JSON can hold,
            are encoded as if they were characters.
        offsets: (number of texts + 1,) int64, where each begins.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray):
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedText":
        texts = list(texts)
        joined = "".join(texts)
        if joined.isascii():  # a byte for a character: twice as fast as the general way
            return cls(np.frombuffer(joined.encode(), np.uint8), offsets(list(map(len, texts))))
        return cls._join([text.encode("utf-8", "surrogatepass") for text in texts])

    @classmethod
    def _join(cls, encoded: list[bytes]) -> "PackedText":
        buffer = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(buffer, offsets([len(text) for text in encoded]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.buffer[start:end].tobytes().decode("utf-8", "surrogatepass")

    def take(self, indices: np.ndarray) -> "PackedText":
        """These texts alone, in this order."""
        content = memoryview(self.buffer)
        ends = self.offsets[1:]
        return self._join(
            [content[self.offsets[index] : ends[index]].tobytes() for index in indices]
        )


class Records(Sequence[CaptionRecord]):
    """A sequence of `CaptionRecord`, made as they are asked for.

    Args:
        ids: (images,) int64, or each id as JSON where they are text.
        names: of the images, relative to `roots`.
        captions: of all images, an image's side by side.
        firsts: (images + 1,) int64, each image's first caption.
        roots: folders of images, or tar shards.
        root_of: (images,) int32, each image's root; None where there is one for all.
        spans: (images, 2) int64, offset and size of each image in its shard; None for files.
    """

    def __init__(
        self,
        ids: np.ndarray | PackedText,
        names: PackedText,
        captions: PackedText,
        firsts: np.ndarray,
        roots: PackedText,
        root_of: np.ndarray | None = None,
        spans: np.ndarray | None = None,
    ):
        self.ids = ids
        self.names = names
        self.captions = captions
        self.firsts = firsts
        self.roots = roots
        self.root_of = root_of
        self.spans = spans

    @classmethod
    def of_files(
        cls,
        ids: Sequence[int | str],
        names: Sequence[str],
        captions: Sequence[Sequence[str]],
        root: str | os.PathLike,
    ) -> "Records":
        """Images in a folder: id, name relative to `root` and captions of each."""
        return cls(
            pack_ids(ids),
            PackedText.pack(names),
            PackedText.pack(itertools.chain.from_iterable(captions)),
            offsets([len(texts) for texts in captions]),
            PackedText.pack([os.path.abspath(root)]),
        )

    @property
    def num_captions(self) -> int:
        return len(self.captions)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        root = self.roots[0 if self.root_of is None else self.root_of[index]]
        content = None
        if self.spans is not None:
            offset, size = self.spans[index].tolist()
            content = Span(root, offset, size)
        first, end = self.firsts[index : index + 2]
        return CaptionRecord(
            self._id(index),
            os.path.join(root, self.names[index]),
            tuple(self.captions[i] for i in range(first, end)),
            content,
        )

    def _id(self, index: int) -> int | str:
        image_id = self.ids[index]
        return json.loads(image_id) if isinstance(image_id, str) else int(image_id)

    def __iter__(self) -> Iterator[CaptionRecord]:
        return map(self.__getitem__, range(len(self)))

    def select(self, images: np.ndarray, captions: np.ndarray) -> "Records":
        """Some images with some of their captions.

        Args:
            images: rising indices of images.
            captions: (captions,) bool, those to keep; at least one of each image in `images`.
        """
        kept = np.zeros(len(self), bool)
        kept[images] = True
        counts = np.diff(self.firsts)
        captions = captions & np.repeat(kept, counts)
        numbers = np.diff(offsets(captions)[self.firsts])[images]
        return Records(
            self.ids.take(images),
            self.names.take(images),
            self.captions.take(np.flatnonzero(captions)),
            offsets(numbers),
            self.roots,
            None if self.root_of is None else self.root_of[images],
            None if self.spans is None else self.spans[images],
        )


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64: where each begins, and where the last ends."""
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def pack_ids(ids: Sequence[int | str]) -> np.ndarray | PackedText:
    """As int64 where all are such numbers, else each as JSON, which tells 7 from "7"."""
    if all(type(image_id) is int and image_id in INT64 for image_id in ids):
        return np.array(ids, np.int64)
    return PackedText.pack(map(json.dumps, ids))


def caption_counts(records: Sequence[CaptionRecord]) -> np.ndarray:
    """(images,) int64: the number of captions of each image."""
    if isinstance(records, Records):
        return np.diff(records.firsts)
    if parts := getattr(records, "parts", None):  # a mixture's
        return np.concatenate([caption_counts(part) for part in parts])
    return np.array([len(record.captions) for record in records], np.int64)
