"""Training batches for detectors; an image that cannot be decoded is replaced and counted."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)

logger = logging.getLogger(__name__)

# How many images in a row may fail to decode before the data is given up.
MAX_REPLACEMENTS = 100


class ReplacingMapper:
    """detectron2's training mapper; the next record takes the place of one that cannot be decoded.

    Paths of such images are in the sample as `skipped_files`.

    Args:
        cfg: the detector's config.
        records: the data set, each with its `index` in the list.
    """

    def __init__(self, cfg: CfgNode, records: list[dict]):
        self._mapper = DatasetMapper(cfg, is_train=True)
        self._records = records

    def __call__(self, record: dict) -> dict:
        """A record of the data set -> detectron2's training sample.

        Raises:
            OSError: `MAX_REPLACEMENTS` images in a row cannot be decoded.
        """
        skipped = []
        for step in range(min(MAX_REPLACEMENTS, len(self._records))):
            candidate = self._records[(record["index"] + step) % len(self._records)]
            try:
                return {**self._mapper(candidate), "skipped_files": skipped}
            except (OSError, SyntaxError) as error:  # Pillow's words for a damaged file
                skipped.append(candidate["file_name"])
                last = error
        raise OSError(
            f"{len(skipped)} images in a row cannot be decoded, from {skipped[0]} on: {last}"
        ) from last


class SkipCounter:
    """A training loader that remembers which files its samples had to do without.

    Attributes:
        skipped: their paths.
        num_images: images of the data set.
    """

    def __init__(self, loader, num_images: int):
        self._loader = loader
        self.num_images = num_images
        self.skipped: set[str] = set()

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
            for sample in batch:
                for name in sample.pop("skipped_files"):
                    if name not in self.skipped:
                        self.skipped.add(name)
                        logger.warning("%s: cannot be decoded and is skipped", name)
            yield batch


def build_train_loader(cfg: CfgNode) -> SkipCounter:
    """detectron2's training loader of DATASETS.TRAIN with `ReplacingMapper`."""
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=0,
        proposal_files=None,
    )
    for index, record in enumerate(records):
        record["index"] = index
    loader = build_detection_train_loader(
        cfg, dataset=records, mapper=ReplacingMapper(cfg, records)
    )
    return SkipCounter(loader, len(records))
