"""Work beside training that leaves training's random numbers as they are."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng


@contextlib.contextmanager
def own_randomness(seed: int, iteration: int) -> Iterator[None]:
    """The body draws from (seed, iteration, rank); afterwards all generators stand as before.

    Building a data loader, going through it, augmenting and sampling proposals all draw from the
    global generators. Without this a run would train other weights whenever it also evaluates.

    Args:
        seed: of the run.
        iteration: of the trainer; another one gives other numbers.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    sequence = np.random.SeedSequence([seed % 2**32, iteration, comm.get_rank()])
    with torch.random.fork_rng(devices=devices):
        seed_all_rng(int(sequence.generate_state(1)[0]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
