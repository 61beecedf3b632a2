"""Batches for detectors: a function of (seed, iteration), no history.

So a run that is resumed at an iteration goes on with the batch that it would have had, and 8
processes see together what 1 would. An image that cannot be used is named; in training it is
replaced.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from virtex_d2.detection.datasets import register_fraction
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.stopping import abandonable
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")

# How many records in a row may be unusable before the data is given up.
MAX_REPLACEMENTS = 100

# For an image that is damaged or absent (engine/images.py), or of another size than annotated.
_UNUSABLE = (OSError, SizeMismatchError)


@dataclass(frozen=True)
class TrainingSet:
    """The records of DATASETS.TRAIN with what their order depends on.

    Attributes:
        records: detectron2's, each with its `index` here.
        upright: (N,) bool, whether an image is at least as high as wide.
        factors: (N,) how often each appears in an epoch; None: all once.
        skipped: the unusable files that this process has met so far, in any of its loaders.
    """

    records: DatasetFromList
    upright: np.ndarray
    factors: torch.Tensor | None
    skipped: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.records)


def read_training_set(cfg: CfgNode) -> TrainingSet:
    """Read the annotations of DATASETS.TRAIN, or of VIRTEX.FRACTION of its images."""
    fraction, seed = cfg.VIRTEX.FRACTION, cfg.VIRTEX.FRACTION_SEED
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    dicts = get_detection_dataset_dicts(
        [register_fraction(name, fraction, seed) for name in cfg.DATASETS.TRAIN],
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    for index, record in enumerate(dicts):
        record["index"] = index
    upright = np.array([record["width"] <= record["height"] for record in dicts])
    factors = repeat_factors(cfg, dicts)
    return TrainingSet(DatasetFromList(dicts, copy=False), upright, factors)


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


def build_sampler(
    cfg: CfgNode, size: int, factors: torch.Tensor | None, seed: int
) -> TrainingSampler | RepeatFactorTrainingSampler:
    """DATALOADER.SAMPLER_TRAIN over `size` records, with a seed of its own."""
    if factors is not None:
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)
    return TrainingSampler(size, seed=seed)


class Draw(NamedTuple):
    """One image of a batch: its record, and its place among all draws, which augments it."""

    index: int
    position: int


class TrainingOrder(Sampler[list[Draw]]):
    """This process's share of every iteration's images, without end.

    Where images are grouped by aspect ratio, all of an iteration's images are upright or all lie,
    on all processes; detectron2 groups on each.

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
        self._indices, self._upright, self._batch_size = indices, upright, batch_size
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


class TrainingSamples(Dataset):
    """Samples by draw, of detectron2's mapper; the next usable record replaces an unusable one.

    The next in the data set's order, so that a run's samples do not depend on how many workers it
    has. Samples name those that they stand in for in `unusable`: [(file, reason), ...]. It does not
    raise: an exception from a worker process would arrive as a traceback.

    Args:
        cfg: the detector's config.
        records: the data set, each with its `index` there.
        seed: of augmentation, which is a function of (seed, position).
    """

    def __init__(self, cfg: CfgNode, records: DatasetFromList, seed: int):
        self._mapper = DatasetMapper(cfg, is_train=True)
        self._records, self._seed = records, seed

    def __getitem__(self, draw: Draw) -> dict:
        """The sample, without `image` where no record is usable."""
        with own_randomness(self._seed, draw.position):
            unusable = []
            for step in range(min(MAX_REPLACEMENTS, len(self._records))):
                candidate = self._records[(draw.index + step) % len(self._records)]
                try:
                    return {**self._mapper(candidate), "unusable": unusable}
                except _UNUSABLE as error:
                    unusable.append((candidate["file_name"], _reason(error)))
        record = self._records[draw.index]
        return {"width": record["width"], "height": record["height"], "unusable": unusable}


class TrainLoader:
    """A training loader whose batches are a function of (seed, iteration).

    Args:
        cfg: the detector's config.
        training_set: of `read_training_set`.
        seed: of order and augmentation; the same in all processes.
    """

    def __init__(self, cfg: CfgNode, training_set: TrainingSet, seed: int):
        self.training_set = training_set
        records = training_set.records
        self._order = TrainingOrder(
            build_sampler(cfg, len(records), training_set.factors, seed),
            training_set.upright if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
            cfg.SOLVER.IMS_PER_BATCH,
            comm.get_rank(),
            comm.get_world_size(),
        )
        self._loader = DataLoader(
            TrainingSamples(cfg, records, seed),
            batch_sampler=self._order,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
            worker_init_fn=start_worker,
            # else the global one's, which is the training's, would move on with every new pass
            generator=torch.Generator(),
        )

    @property
    def skipped(self) -> set[str]:
        """The unusable files met so far."""
        return self.training_set.skipped

    def start_at(self, iteration: int) -> "TrainLoader":
        """Begin the next pass with the batch of this iteration, from 0; return the loader."""
        self._order.first = iteration
        return self

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in batches_of(lambda: iter(self._loader)):
            for sample in batch:
                self._note(sample.pop("unusable"))
                if "image" not in sample:
                    many = len(self.training_set) > MAX_REPLACEMENTS
                    raise InputError(
                        f"{MAX_REPLACEMENTS if many else 'All'} "
                        f"training images in a row are unusable ({len(self.skipped)} so far), the "
                        f"first: {', '.join(sorted(self.skipped)[:10])}. Check the image folder."
                    )
            yield batch

    def _note(self, unusable: list[tuple[str, str]]) -> None:
        for file, reason in unusable:
            if file not in self.skipped:
                self.skipped.add(file)
                logger.warning(
                    "%s: skipped, another image takes its place (%s); %d of %d skipped so far",
                    *(file, reason, len(self.skipped), len(self.training_set)),
                )


def build_train_loader(
    cfg: CfgNode, training_set: TrainingSet | None = None, seed: int | None = None
) -> TrainLoader:
    """Batches of the training images, without end.

    Args:
        cfg: the detector's config.
        training_set: of an earlier loader, to read the annotations but once.
        seed: of order and augmentation. None: drawn, the same in all processes.
    """
    if training_set is None:
        training_set = read_training_set(cfg)
    return TrainLoader(cfg, training_set, comm.shared_random_seed() if seed is None else seed)


class TestLoader:
    """A test loader that stops with the file's name at an unusable image, or where the run stops.

    To leave it out would change what the AP means.
    """

    __test__ = False  # for pytest: the name alone looks like a test

    def __init__(self, cfg: CfgNode, dataset_name: str):
        mapper = DatasetMapper(cfg, is_train=False)
        self._loader = build_detection_test_loader(cfg, dataset_name, mapper=_NamingMapper(mapper))
        self._loader.worker_init_fn = start_worker

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in abandonable(batches_of(lambda: iter(self._loader))):
            for sample in batch:
                if "unusable" in sample:
                    raise InputError(
                        f"{sample['file_name']}: this test image is unusable "
                        f"({sample['unusable']}). Replace it, or remove it from the annotation "
                        "file; a finished training is evaluated with --eval-only --resume."
                    )
            yield batch


class _NamingMapper:
    def __init__(self, mapper: DatasetMapper):
        self._mapper = mapper

    def __call__(self, record: dict) -> dict:
        try:
            return self._mapper(record)
        except _UNUSABLE as error:
            return {"file_name": record["file_name"], "unusable": _reason(error)}


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
