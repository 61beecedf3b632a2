"""Which image comes at which position, and the random numbers that belong to it.

Orders are epochs of one source, or several mixed by weights. All random numbers follow from (seed,
purpose, place), none from a history.
"""

import functools
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np

from pretrain.data.records import CaptionRecord, MixedRecords
from virtex_d2.engine.errors import InputError

# Positions within which each source gets its exact share.
BLOCK = 1000


class Stream(IntEnum):
    """Purposes of random numbers; keeps those of different purposes apart.

    A number belongs to its purpose for good: another one would give runs other data.
    """

    EPOCH_ORDER = 0
    SAMPLE = 1  # caption, crop, flip, jitter
    MASKED_WORDS = 2
    PARALLEL_PREDICTION = 3
    IMAGE_LABELS = 4
    MIXTURE = 5
    SHARD_ORDER = 6
    BLOCK_ORDER = 7
    RESTORATION_TASK = 9


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """Make the generator of one place (a position, an epoch, a lane and its block, ...).

    Args:
        place: not negative; always as many for a stream, because numpy takes missing ones for 0.
    """
    return np.random.default_rng([seed, int(stream), *place])


class Epochs:
    """Position -> image: one source's images, in an order that changes with each epoch."""

    def __init__(self, size: int, seed: int, source: int = 0):
        self._size = size
        self._seed = seed
        self._source = source
        self._orders: dict[int, np.ndarray] = {}

    def candidates(self, position: int) -> Iterator[int]:
        """The image of a position, then those after it in the epoch's order: its replacements."""
        epoch, place = divmod(position, self._size)
        order = self.order(epoch)
        return (int(order[(place + step) % self._size]) for step in range(self._size))

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation; the last two are kept: a batch may span both."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            rng = generator(self._seed, Stream.EPOCH_ORDER, epoch, self._source)
            self._orders[epoch] = rng.permutation(self._size)
        return self._orders[epoch]


class Mixture:
    """Position -> image of one of several sources.

    Each stretch of `BLOCK` positions has every source in its exact share, in an order that follows
    from (seed, stretch). A source's n-th turn is position n of its own epochs.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self._sources = [Epochs(size, seed, source) for source, size in enumerate(sizes)]
        self._quotas = tuple(quotas(weights))
        self._firsts = np.concatenate([[0], np.cumsum(sizes)])[:-1].tolist()
        self._seed = seed

    def candidates(self, position: int) -> Iterator[int]:
        """The image of a position, then its replacements from the same source."""
        stretch, place = divmod(position, BLOCK)
        turns = _turns(self._seed, stretch, self._quotas)
        source = turns[place]
        own = stretch * self._quotas[source] + int((turns[:place] == source).sum())
        first = self._firsts[source]
        return (first + image for image in self._sources[source].candidates(own))


@functools.lru_cache(maxsize=2)
def _turns(seed: int, stretch: int, shares: tuple[int, ...]) -> np.ndarray:
    """(BLOCK,) the source of each position."""
    in_order = np.repeat(np.arange(len(shares)), shares)
    return generator(seed, Stream.MIXTURE, stretch).permutation(in_order)


def quotas(weights: Sequence[float]) -> list[int]:
    """Whole positions of `BLOCK` for each source, by largest remainders."""
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(
            f"DATA.TRAIN_SOURCES: the weights {list(weights)} must be positive numbers. Remove "
            "sources that are not wanted."
        )
    shares = np.array(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(shares).astype(int)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: BLOCK - counts.sum()]] += 1
    if 0 in counts:
        raise InputError(
            f"DATA.TRAIN_SOURCES: the weight {weights[int(np.argmin(counts))]} is less than "
            f"1/{BLOCK} of the weights' sum, so that its source never comes. Raise it."
        )
    return counts.tolist()


def order_of(records: Sequence[CaptionRecord], seed: int) -> Epochs | Mixture:
    """The order in which training visits records."""
    if isinstance(records, MixedRecords):
        return Mixture([len(part) for part in records.parts], records.weights, seed)
    return Epochs(len(records), seed)
