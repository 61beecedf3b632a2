"""The random numbers of samples and orders: all from (seed, stream, place), none from a history."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for; keeps those of different purposes apart.

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


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The generator of one place (a position, an epoch, a lane and its block, ...).

    Args:
        seed: of the run, not negative.
        stream: what the numbers are for.
        place: not negative; always as many for a stream, because numpy takes missing ones for 0.
    """
    return np.random.default_rng([seed, int(stream), *place])
