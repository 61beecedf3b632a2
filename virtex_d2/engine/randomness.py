"""Random numbers that belong to a place (a seed, an iteration, a sample) and to no history."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def place_seed(*place: int) -> int:
    """A seed below 2**63 for one place.

    Args:
        place: not negative; of one purpose always as many, because numpy takes missing ones for 0.
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def own_randomness(*place: int) -> Iterator[None]:
    """The body draws from the generators of its place; afterwards all stand as they were before.

    Python's, numpy's and torch's global generators, the latter of the CPU and of the current GPU.
    Building a data loader, augmenting and sampling proposals all draw from them; without this, what
    is done beside training would change it.

    Args:
        place: as of `place_seed`.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # A worker process, forked from one with a GPU, may not touch it.
    on_gpu = torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices=devices):
        seed = place_seed(*place)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
