"""Shards that can only be read forwards, as lanes of samples that go on for ever.

The shards are shuffled anew for each pass over them; lane l of L takes every L-th of that endless
row, from the l-th on. A lane shuffles its samples in blocks. What a lane gives follows from
(seed, lane) alone, and a cursor says where in it one is.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pretrain.data.order import Stream, generator
from pretrain.data.records import CaptionRecord
from pretrain.data.shards import Unusable, contents_of, group, stream_members

# How many samples and shards in a row may be unusable before a lane gives up.
MAX_FAILURES = 100

# Name and reason of what is passed over.
Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Cursor:
    """Where a lane is."""

    shard: int = 0  # number of shards that it has read to their ends, when its block began
    sample: int = 0  # number of samples of the next shard that it had read then
    block: int = 0  # number of blocks that it has given
    taken: int = 0  # number of samples that it has given of the next one


@dataclass(frozen=True)
class Plan:
    """What all lanes know: the shards and how they are read."""

    shards: tuple[str, ...]  # names, such as "pipe:cat a.tar"
    lanes: int  # at most as many as there are shards
    block: int = 100  # samples that a lane shuffles at a time, and holds, still encoded
    seed: int = 0  # of the orders of shards and samples
    fraction: float = 1.0  # of the samples, chosen by their keys
    captions_per_image: int = 0  # at most so many of each, chosen by key and number; 0 keeps all
    subset_seed: int = 0  # of both choices: smaller sets lie inside larger ones
    caption_key: str = ""  # of the captions in samples' JSON; "" is "caption"

    @property
    def held(self) -> int:
        """Samples that all lanes hold at most: read, and not given yet."""
        return self.lanes * self.block

    def shard(self, ordinal: int) -> str:
        """A shard of the endless row."""
        cycle, place = divmod(ordinal, len(self.shards))
        return self.shards[_shard_order(self.seed, cycle, len(self.shards))[place]]

    def shuffled(self, block: list, lane: int, number: int) -> list:
        """A lane's block in the order in which it is given."""
        rng = generator(self.seed, Stream.BLOCK_ORDER, lane, number)
        return [block[i] for i in rng.permutation(len(block))]

    def chosen(self, key: str, captions: list[str]) -> tuple[str, ...]:
        """The captions to keep of a sample; none where it is not in the fraction."""
        if self.fraction < 1 and self._luck(key) >= self.fraction:
            return ()
        if not 0 < self.captions_per_image < len(captions):
            return tuple(captions)
        by_luck = sorted(range(len(captions)), key=lambda i: self._luck(f"{key} {i}"))
        return tuple(captions[i] for i in sorted(by_luck[: self.captions_per_image]))

    def _luck(self, text: str) -> float:
        """In [0, 1), from the seed and the text."""
        content = f"{self.subset_seed} {text}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big") / 2**48


@functools.lru_cache(maxsize=2)
def _shard_order(seed: int, cycle: int, count: int) -> np.ndarray:
    return generator(seed, Stream.SHARD_ORDER, cycle).permutation(count)


class Lane:
    """One lane, from a cursor on."""

    def __init__(self, number: int, plan: Plan, cursor: Cursor):
        self.cursor = cursor
        self._number = number
        self._plan = plan
        self._reading = replace(cursor, block=0, taken=0)  # where the next block will begin
        self._samples = self._usable_samples()
        self._failures: Failures = []
        self._block: list[CaptionRecord | None] = []
        if cursor.taken:  # what was passed over in this block has been reported
            self._fill([])
            self._block[: cursor.taken] = [None] * cursor.taken

    def records(self, failures: Failures) -> Iterator[CaptionRecord]:
        """The lane's next records, with their images' bytes; ends after too many failures.

        Args:
            failures: what is passed over on the way is added to it, here and by the caller.
        """
        while len(failures) < MAX_FAILURES:
            if self.cursor.taken == len(self._block):
                self._next_block()
                self._fill(failures)
                if not self._block:
                    return
            place = self.cursor.taken
            self.cursor = replace(self.cursor, taken=place + 1)
            record, self._block[place] = self._block[place], None
            yield record

    def _next_block(self) -> None:
        if self.cursor.taken:
            self.cursor = replace(self._reading, block=self.cursor.block + 1, taken=0)

    def _fill(self, failures: Failures) -> None:
        """Read the block that begins where the lane is."""
        self._failures = failures
        block: list[CaptionRecord] = []
        for record in self._samples:
            if record is None:
                break
            block.append(record)
            if len(block) == self._plan.block:
                break
        self._block = self._plan.shuffled(block, self._number, self.cursor.block)

    def _usable_samples(self) -> Iterator[CaptionRecord | None]:
        """Records without an end; None where too much in a row was of no use."""
        failed = fruitless = 0
        while True:
            for found in self._samples_of_shard():
                if isinstance(found, CaptionRecord):
                    failed = fruitless = 0
                    yield found
                elif found is not None:
                    self._failures.append(found)
                    failed += 1
                    if failed == MAX_FAILURES:
                        failed = 0
                        yield None
            fruitless += 1
            if fruitless > len(self._plan.shards):
                fruitless = 0
                self._failures.append((self._plan.shards[0], "DATA.FRACTION leaves no sample"))
                yield None

    def _samples_of_shard(self) -> Iterator[CaptionRecord | tuple[str, str] | None]:
        """Of each sample the record, or name and reason where it is of no use, or None where it is
        not in the fraction."""
        shard = self._plan.shard(self._number + self._reading.shard * self._plan.lanes)
        skip, place, reason = self._reading.sample, 0, ""
        try:
            for place, sample in enumerate(group(stream_members(shard)), 1):
                if place <= skip:
                    continue
                self._reading = replace(self._reading, sample=place)
                try:
                    suffix, image, found = contents_of(sample, bytes, self._plan.caption_key)
                except Unusable as error:
                    yield f"{shard}/{sample.key}", str(error)
                    continue
                captions = self._plan.chosen(sample.key, found)
                name = f"{shard}/{sample.key}.{suffix}"
                yield CaptionRecord(sample.key, name, captions, image) if captions else None
        except Unusable as error:
            reason = str(error)
        self._reading = Cursor(self._reading.shard + 1)
        if reason or not place:
            yield shard, reason or "it holds no samples"
