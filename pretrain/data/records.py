"""Records of images and their captions, packed in arrays; mixtures, fractions and checks of them.

A list of 118 000 records with 590 000 captions is some 700 000 Python objects. A data loader's
forked worker that reads them writes their reference counts, and so copies the pages that they lie
in: each worker ends with a list of its own. Arrays are read without being written.
"""

import bisect
import io
import itertools
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_text
from virtex_d2.engine.images import missing_files, names_in

Path = str | os.PathLike
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a file: a member of a tar shard, offset and size in bytes."""

    path: str
    offset: int
    size: int

    def open(self) -> io.BytesIO:
        with open(self.path, "rb") as shard:
            shard.seek(self.offset)
            return io.BytesIO(shard.read(self.size))


class Stored(Protocol):
    """What holds an image that is no file of its own."""

    def open(self) -> io.BytesIO:
        """Return an encoded image, or raise OSError."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One image and what people said of it."""

    # as in the annotation file; the name or the key where the format has no ids
    image_id: int | str
    file_name: str  # absolute path of the image, or `shard.tar/key.jpg`
    captions: tuple[str, ...]  # none of them blank; of images alone there are none
    # what opens an image that lies in another file, or its bytes; None for a file of its own
    content: Stored | bytes | None = None

    def image_file(self) -> str | io.BytesIO:
        """Return what the image can be decoded from: its path, or its bytes.

        Raises:
            OSError: what holds it cannot be read.
        """
        if self.content is None:
            return self.file_name
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return self.content.open()


@dataclass(frozen=True, eq=False, repr=False)
class PackedText(Sequence[str]):
    """Texts in one buffer, read one at a time."""

    # (bytes,) uint8, the texts in UTF-8; halves of surrogate pairs, which JSON can hold, are
    # encoded as if they were characters
    buffer: np.ndarray
    offsets: np.ndarray  # (number of texts + 1,) int64, where each begins

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
        """Keep these texts alone, in this order."""
        content, ends = memoryview(self.buffer), self.offsets[1:]
        return self._join([content[self.offsets[i] : ends[i]].tobytes() for i in indices])


@dataclass(frozen=True, eq=False, repr=False)
class Records(Sequence[CaptionRecord]):
    """A sequence of `CaptionRecord`, made as they are asked for."""

    ids: np.ndarray | PackedText  # (images,) int64, or each id as JSON where they are text
    names: PackedText  # of the images, relative to `roots`
    captions: PackedText  # of all images, an image's side by side
    firsts: np.ndarray  # (images + 1,) int64, each image's first caption
    roots: PackedText  # folders of images, or tar shards
    # (images,) int32, each image's root; None where there is one for all
    root_of: np.ndarray | None = None
    # (images, 2) int64, offset and size of each image in its shard; None for files
    spans: np.ndarray | None = None

    @classmethod
    def of_files(
        cls,
        ids: Sequence[int | str],
        names: Sequence[str],
        captions: Iterable[Sequence[str]],
        root: Path,
    ) -> "Records":
        """Pack images in a folder: id, name relative to `root` and captions of each."""
        captions = list(captions)
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
        image_id = self.ids[index]
        root = self.roots[0 if self.root_of is None else self.root_of[index]]
        first, end = self.firsts[index : index + 2]
        return CaptionRecord(
            json.loads(image_id) if isinstance(image_id, str) else int(image_id),
            os.path.join(root, self.names[index]),
            tuple(self.captions[i] for i in range(first, end)),
            self.content(root, index),
        )

    def content(self, root: str, index: int) -> Stored | None:
        """What opens an image that is no file of its own."""
        return None if self.spans is None else Span(root, *self.spans[index].tolist())

    def select(self, images: np.ndarray, captions: np.ndarray) -> "Records":
        """Keep some images with some of their captions.

        Args:
            images: rising indices of images.
            captions: (captions,) bool, those to keep; at least one of each image in `images`.
        """
        kept = np.zeros(len(self), bool)
        kept[images] = True
        counts = np.diff(self.firsts)
        captions = captions & np.repeat(kept, counts)
        numbers = np.diff(offsets(captions)[self.firsts])[images]
        return replace(
            self,
            ids=self.ids.take(images),
            names=self.names.take(images),
            captions=self.captions.take(np.flatnonzero(captions)),
            firsts=offsets(numbers),
            root_of=None if self.root_of is None else self.root_of[images],
            spans=None if self.spans is None else self.spans[images],
        )


class JoinedRecords(Sequence[CaptionRecord]):
    """The records of all sources, one source after the other.

    Args:
        parts: at least one source, none of them empty.
    """

    def __init__(self, parts: Sequence[Sequence[CaptionRecord]]):
        self.parts = parts
        self._firsts = offsets([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> CaptionRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = self.part_of(index)
        return self.parts[part][index - self._firsts[part]]

    def part_of(self, index: int) -> int:
        """The number of the source that a record is of."""
        return bisect.bisect_right(self._firsts, index) - 1


class MixedRecords(JoinedRecords):
    """Sources that training visits by weights.

    Args:
        parts: as above.
        weights: positive, one for each source; `pretrain.data.order` draws by them.
    """

    def __init__(self, parts: Sequence[Sequence[CaptionRecord]], weights: Sequence[float]):
        super().__init__(parts)
        self.weights = tuple(weights)


def take_fraction(
    records: Records, fraction: float = 1.0, captions_per_image: int = 0, seed: int = 0
) -> Records:
    """Take the first images of a random order, in the records' order, with some captions of each.

    Subsets of one seed are nested: 10 % of the images are among 20 %, and a single caption of an
    image is one of its two. Which captions an image keeps does not depend on the fraction.

    Args:
        fraction: of the images, rounded to the nearest number.
        captions_per_image: at most so many of each; 0 keeps all.
    """
    check_subset(fraction, captions_per_image)
    if fraction == 1 and captions_per_image == 0:
        return records
    count = round(fraction * len(records))
    if count == 0:
        raise InputError(
            f"DATA.FRACTION {fraction} of {len(records)} images is none: use at least "
            f"{1 / len(records):.2g}."
        )
    images = np.sort(np.random.default_rng([seed, 0]).permutation(len(records))[:count])
    captions = np.ones(records.num_captions, bool)
    if captions_per_image:
        captions = _ranks_within(records, seed) < captions_per_image
    return records.select(images, captions)


def check_subset(fraction: float, captions_per_image: int) -> None:
    """Refuse a fraction that is not in (0, 1], and fewer than 0 captions."""
    if not 0 < fraction <= 1:
        raise InputError(f"DATA.FRACTION {fraction}: expected more than 0, up to 1 for all.")
    if captions_per_image < 0:
        raise InputError(
            f"DATA.CAPTIONS_PER_IMAGE {captions_per_image}: expected 0 for all, or more."
        )


def _ranks_within(records: Records, seed: int) -> np.ndarray:
    """(captions,) int64: each caption's place in a random order of its image's captions."""
    luck = np.random.default_rng([seed, 1]).random(records.num_captions)
    image_of = np.repeat(np.arange(len(records)), np.diff(records.firsts))
    order = np.lexsort((luck, image_of))  # by image, then by luck: images keep their places
    ranks = np.empty(records.num_captions, np.int64)
    ranks[order] = np.arange(records.num_captions) - records.firsts[image_of]
    return ranks


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64: where each begins, and where the last ends."""
    result = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def pack_ids(ids: Sequence[int | str]) -> np.ndarray | PackedText:
    """Pack as int64 where all are such numbers, else each as JSON, which tells 7 from "7"."""
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


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, by their numbers; only \\n and \\r\\n end one."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def captions_in_text(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def refuse(path: Path, found: Iterable[str], what: str, what_to_do: str) -> None:
    """Raise where anything was found; the message counts all of it and names the first ten."""
    if found := list(found):
        first = ", ".join(found[:10])
        raise InputError(f"{path}: {len(found)} {what}; the first: {first}. {what_to_do}")


def packed(
    ids: Sequence[int | str], names: list[str], captions: list[list[str]], path: Path, root: Path
) -> Records:
    """Pack records, all of whose images are on the disk."""
    require_folder(root, f"the images of {path}")
    root = os.path.abspath(root)
    absent = [names[i] for i in missing_files(os.path.join(root, name) for name in names)]
    advice = "Check the folder of images, or remove them from the file."
    for name in absent[:10]:
        if near := near_name(name, root):
            advice = f"{near!r} is there, for {name!r}: names must be the same to the letter."
            break
    whole = [os.path.join(root, name) for name in absent]
    refuse(path, whole, f"of its {len(names)} images are not on the disk", advice)
    return Records.of_files(ids, names, captions, root)


def require_folder(folder: Path, of_what: str) -> None:
    if not os.fspath(folder):
        raise InputError(
            f"No folder is given for {of_what}. Name it: DATA.TRAIN_IMAGES, DATA.VAL_IMAGES or "
            "--images."
        )
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "none"
        raise InputError(f"'{folder}': expected the folder of {of_what}, found {found} there.")


def near_name(name: str, root: Path) -> str:
    """A file that is called nearly like one that is not there (`plain_name`), in its folder or in
    `root` itself; "" where there is none."""
    folder, base = os.path.split(name)
    for place in dict.fromkeys((folder, "")):
        for other in sorted(names_in(os.path.join(root, place))):
            if plain_name(other) == plain_name(base):
                return os.path.join(place, other)
    return ""


def plain_name(name: str) -> str:
    """Strip a file's name of case, suffix, leading zeros, quotes and Unicode form."""
    name = unicodedata.normalize("NFC", name).casefold().strip(" \"'")
    return os.path.splitext(name)[0].lstrip("0") or "0"
