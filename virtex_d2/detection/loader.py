"""Batches for detectors. An image that cannot be used is named; in training it is replaced."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

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
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from virtex_d2.detection.datasets import register_fraction
from virtex_d2.detection.order import Draw, TrainingOrder, build_sampler, repeat_factors
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.preemption import abandonable
from virtex_d2.engine.randomness import own_randomness
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

# How many records in a row may be unusable before the data is given up.
MAX_REPLACEMENTS = 100

# For an image that is damaged or absent (runtime/images.py), or of another size than annotated.
_UNUSABLE = (OSError, SizeMismatchError)


class ReplacingMapper:
    """detectron2's training mapper; for an unusable image the next usable record steps in.

    The next in the data set's order, so that a run's samples do not depend on how many workers it
    has. Mapped samples name those that they stand in for in `unusable`: [(file, reason), ...]. It
    does not raise: an exception from a worker process would arrive as a traceback.

    Args:
        cfg: the detector's config.
        records: the data set, each with its `index` there.
    """

    def __init__(self, cfg: CfgNode, records: DatasetFromList):
        self._mapper = DatasetMapper(cfg, is_train=True)
        self._records = records

    def __call__(self, record: dict) -> dict:
        """A record of the data set -> a training sample, without `image` where none is usable."""
        unusable = []
        for step in range(min(MAX_REPLACEMENTS, len(self._records))):
            candidate = self._records[(record["index"] + step) % len(self._records)]
            try:
                return {**self._mapper(candidate), "unusable": unusable}
            except _UNUSABLE as error:
                unusable.append((candidate["file_name"], _reason(error)))
        return {"width": record["width"], "height": record["height"], "unusable": unusable}


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
    dicts = get_detection_dataset_dicts(
        [register_fraction(name, fraction, seed) for name in cfg.DATASETS.TRAIN],
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    for index, record in enumerate(dicts):
        record["index"] = index
    upright = np.array([record["width"] <= record["height"] for record in dicts])
    factors = repeat_factors(cfg, dicts)
    return TrainingSet(DatasetFromList(dicts, copy=False), upright, factors)


class _Samples(Dataset):
    """Mapped samples by draw; a sample's augmentation is a function of (seed, position)."""

    def __init__(self, records: DatasetFromList, mapper: ReplacingMapper, seed: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, draw: Draw) -> dict:
        with own_randomness(self._seed, draw.position):
            return self._mapper(self._records[draw.index])


class TrainLoader:
    """A training loader whose batches are a function of (seed, iteration).

    It knows which files its batches had to do without.

    Args:
        cfg: the detector's config.
        training_set: of `read_training_set`.
        seed: of order and augmentation; the same in all processes.

    Attributes:
        training_set: the data set.
    """

    def __init__(self, cfg: CfgNode, training_set: TrainingSet, seed: int):
        self.training_set = training_set
        records, workers = training_set.records, cfg.DATALOADER.NUM_WORKERS
        self._order = TrainingOrder(
            build_sampler(cfg, len(records), training_set.factors, seed),
            training_set.upright if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
            cfg.SOLVER.IMS_PER_BATCH,
            comm.get_rank(),
            comm.get_world_size(),
        )
        self._loader = DataLoader(
            _Samples(records, ReplacingMapper(cfg, records), seed),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=start_worker,
            # else the global one's, which is the training's, would move on with every new pass
            generator=torch.Generator(),
        )

    @property
    def skipped(self) -> set[str]:
        """The unusable files met so far."""
        return self.training_set.skipped

    def start_at(self, iteration: int) -> None:
        """Begin the next pass with the batch of this iteration, from 0."""
        self._order.first = iteration

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in batches_of(lambda: iter(self._loader)):
            for sample in batch:
                self._note(sample.pop("unusable"))
                if "image" not in sample:
                    raise InputError(
                        f"{MAX_REPLACEMENTS if self._many else 'All'} "
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
                    file,
                    reason,
                    len(self.skipped),
                    len(self.training_set),
                )

    @property
    def _many(self) -> bool:
        return len(self.training_set) > MAX_REPLACEMENTS


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
        self._loader = build_detection_test_loader(
            cfg, dataset_name, mapper=_NamingMapper(DatasetMapper(cfg, is_train=False))
        )
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
