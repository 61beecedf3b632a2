"""Batches for detectors. An image that cannot be used is named; in training it is replaced."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError

from virtex_d2.runtime.errors import InputError

logger = logging.getLogger(__name__)

# How many records in a row may be unusable before the data is given up.
MAX_REPLACEMENTS = 100

# Of Pillow and detectron2, for an image that is damaged, absent or of another size than annotated.
_UNUSABLE = (OSError, SyntaxError, SizeMismatchError)


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


class TrainLoader:
    """A training loader that knows which files its batches had to do without.

    Attributes:
        records: the data set.
        skipped: the unusable files met so far.
    """

    def __init__(self, cfg: CfgNode, records: DatasetFromList):
        self.records = records
        self.skipped: set[str] = set()
        self._loader = build_detection_train_loader(
            cfg, dataset=records, mapper=ReplacingMapper(cfg, records)
        )

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
            for sample in batch:
                self._note(sample.pop("unusable"))
                if "image" not in sample:
                    raise InputError(
                        f"{MAX_REPLACEMENTS if len(self.records) > MAX_REPLACEMENTS else 'All'} "
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
                    len(self.records),
                )


def build_train_loader(cfg: CfgNode, records: DatasetFromList | None = None) -> TrainLoader:
    """Batches of DATASETS.TRAIN, without end, as detectron2's `build_detection_train_loader`.

    Args:
        cfg: the detector's config.
        records: of an earlier loader, to read the annotations but once.
    """
    if records is None:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        for index, record in enumerate(dicts):
            record["index"] = index
        records = DatasetFromList(dicts, copy=False)
    return TrainLoader(cfg, records)


class TestLoader:
    """A test loader that stops with the file's name at an unusable image.

    To leave it out would change what the AP means.
    """

    __test__ = False  # for pytest: the name alone looks like a test

    def __init__(self, cfg: CfgNode, dataset_name: str):
        self._loader = build_detection_test_loader(
            cfg, dataset_name, mapper=_NamingMapper(DatasetMapper(cfg, is_train=False))
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
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
