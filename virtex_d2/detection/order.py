"""In which order a detector's run sees its images: a function of (seed, iteration), no history.

So a run that is resumed at an iteration goes on with the batch that it would have had, and 8
processes see together what 1 would.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from torch.utils.data import Sampler

from virtex_d2.engine.errors import InputError, nearest

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")


class Draw(NamedTuple):
    """One image of a batch.

    Attributes:
        index: of its record in the data set.
        position: in the order of all draws; its augmentation belongs to it.
    """

    index: int
    position: int


class TrainingOrder(Sampler[list[Draw]]):
    """This process's share of every iteration's images, without end.

    The order is that of detectron2's sampler. Where images are grouped by aspect ratio, all of an
    iteration's images are upright or all lie, on all processes; detectron2 groups on each.

    Args:
        indices: a sampler of `build_sampler`.
        upright: by record, whether the image is at least as high as wide; None: no grouping.
        batch_size: images of an iteration, of all processes.
        rank, processes: which share of a batch: `batch_size / processes` images in a row.
    """

    def __init__(
        self,
        indices: TrainingSampler | RepeatFactorTrainingSampler,
        upright: Sequence[bool] | None,
        batch_size: int,
        rank: int,
        processes: int,
    ):
        self._indices = indices
        self._upright = upright
        self._batch_size = batch_size
        share = batch_size // processes
        self._share = slice(rank * share, (rank + 1) * share)
        self.first = 0  # the iteration with whose batch the next pass begins

    def __iter__(self) -> Iterator[list[Draw]]:
        for iteration, batch in enumerate(self._batches()):
            # What lies before is drawn and left: a million draws take less than a second.
            if iteration >= self.first:
                yield batch[self._share]

    def _batches(self) -> Iterator[list[Draw]]:
        buckets: tuple[list[Draw], list[Draw]] = ([], [])
        # detectron2's samplers iterate over a share of this, by the images' number alone
        for position, index in enumerate(self._indices._infinite_indices()):
            bucket = buckets[0 if self._upright is None else int(self._upright[index])]
            bucket.append(Draw(index, position))
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()


def build_sampler(
    cfg: CfgNode, size: int, factors: torch.Tensor | None, seed: int
) -> TrainingSampler | RepeatFactorTrainingSampler:
    """DATALOADER.SAMPLER_TRAIN with a seed of its own.

    Args:
        cfg: the detector's config.
        size: number of records.
        factors: how often each is to appear in an epoch, of `repeat_factors`.
        seed: of the order.
    """
    if factors is not None:
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)
    return TrainingSampler(size, seed=seed)


def repeat_factors(cfg: CfgNode, records: Sequence[dict]) -> torch.Tensor | None:
    """How often each image appears in an epoch; None where the sampler takes all alike."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in SAMPLERS:
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN is {name!r}; expected one of {', '.join(SAMPLERS)}."
            f"{nearest(name, SAMPLERS)}"
        )
    if name != "RepeatFactorTrainingSampler":
        return None
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, cfg.DATALOADER.REPEAT_THRESHOLD
    )
