"""Samples and batches. A sample is a pure function of (seed, position).

Position p of the endless training stream is image p % len of epoch p // len, in that epoch's order;
`order.py` says which, and mixes several sources. The order and everything random in a sample
follow from (seed, epoch) and (seed, position) alone: not from the number of workers, processes or
restarts. Iteration i takes the positions from i * batch on, and process r of W every W-th of them.

What is made of an image is a method's (`Samples`). The loader opens images, replaces those that
cannot be decoded, and puts samples together.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pretrain.data.order import Stream, generator, order_of
from pretrain.data.records import CaptionRecord, offsets
from pretrain.jpeg import Picture, open_picture
from pretrain.transforms import EvalTransform, TrainTransform
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

# How many images in a row may fail to decode before the data is given up.
MAX_REPLACEMENTS = 100

# How many files are named in the log; what a stream skips has no end.
MAX_NAMED = 10_000

# Path and reason of images that could not be decoded.
Failures = list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Visit:
    """An image at its turn."""

    record: CaptionRecord  # the image and what is said of it
    index: int | None  # of the record; None in a stream, which has no numbers
    # in training `size` and `crop(box, side, flip)`, decoded when it is called; in validation the
    # whole RGB image
    image: Picture | Image.Image
    position: int  # of the sample; in validation that of the image's first one
    seed: int  # of the run

    def rng(self, stream: Stream = Stream.SAMPLE, number: int = 0) -> np.random.Generator:
        """Random numbers for one purpose; in validation of the image's sample `number`."""
        return generator(self.seed, stream, self.position + number)


class Samples:
    """Make samples of images. As it is: one view of each image, and nothing of its captions.

    A sample is a dict of tensors; "image" is (3, S, S) uint8 RGB, channels last in memory, and
    "jitter" what the device does to its colours. The loader adds image_id, position and failures.

    Attributes:
        num_outputs: what the method's last layer tells apart: pieces, classes; 0: nothing.
        padding: key -> what stands behind the shorter rows of a batch. Tensors of other keys have
            one shape.
        train_view, val_view: of `pretrain.transforms`.
    """

    num_outputs: int = 0
    padding: Mapping[str, int] = {}

    def __init__(self, cfg: CfgNode):
        data = cfg.DATA
        self.train_view = TrainTransform(
            data.IMAGE_SIZE,
            scale=tuple(data.CROP_SCALE),
            ratio=tuple(data.CROP_RATIO),
            flip=data.FLIP_PROB,
            jitter=tuple(data.COLOR_JITTER),
            jitter_prob=data.COLOR_JITTER_PROB,
        )
        self.val_view = EvalTransform(data.IMAGE_SIZE)

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        """The sample of a visit.

        Raises:
            OSError: the image cannot be decoded; the next one takes its place.
        """
        pixels, _, jitter = self.train_view(visit.image, "", visit.rng())
        return {"image": pixels, "jitter": jitter}

    def val(self, visit: Visit) -> list[dict[str, torch.Tensor]]:
        """All validation samples of an image, as many as `val_counts` says."""
        return [{"image": self.val_view(visit.image, "")[0]}]

    def val_counts(self, records: Sequence[CaptionRecord]) -> np.ndarray:
        """(images,) int64: how many validation samples each record has."""
        return np.ones(len(records), np.int64)

    def collate(self, samples: list[dict], pin: bool = False) -> dict:
        """Samples -> a batch; `pin`: its images in pinned memory."""
        return collate(samples, self.padding, pin)

    def identity(self) -> dict[str, str]:
        """What gives outputs their meaning (a vocabulary's checksum): a checkpoint keeps it, and
        what is resumed or loaded must have the same.
        """
        return {}


class _Images(Dataset):
    """Records, what is made of them, and which files were named in the log."""

    def __init__(self, records: Sequence[CaptionRecord], samples: Samples, seed: int = 0):
        self.records = records
        self.samples = samples
        self.seed = seed
        self._named: set[str] = set()

    def check(self, batch: dict, full_size: int) -> None:
        """Log each file that could not be used, once; refuse a batch that lacks samples.

        Called in the process that trains: workers know neither each other nor, where they are not
        forked, how the log is set up.
        """
        for path, reason in zip(batch["skipped_files"], batch["skipped_reasons"]):
            if path not in self._named and len(self._named) < MAX_NAMED:
                self._named.add(path)
                logger.warning("%s: it cannot be used and is skipped: %s", path, reason)
        if len(batch["position"]) < full_size:
            raise InputError(
                f"{batch['skipped_files'][0]}: neither this image nor those after it in the order "
                f"(at most {MAX_REPLACEMENTS} are tried) can be used: "
                f"{batch['skipped_reasons'][0]}."
            )


class TrainSet(_Images):
    """Training samples by position; an image that cannot be decoded is replaced.

    By the next one of the epoch's order, and that by its next: batches keep their size, and the
    sample stays a function of the position. Where `MAX_REPLACEMENTS` in a row (or all) fail,
    `failures` is all there is.

    Args:
        records: `MixedRecords` are drawn by their weights; empty for a stream.
    """

    def __init__(self, records: Sequence[CaptionRecord], samples: Samples, seed: int = 0):
        super().__init__(records, samples, seed)
        self.order = order_of(records, seed)

    def __getitem__(self, position: int) -> dict:
        candidates = ((i, self.records[i]) for i in self.order.candidates(position))
        return self.first_usable(position, candidates, [])

    def first_usable(
        self,
        position: int,
        candidates: Iterable[tuple[int | None, CaptionRecord]],
        failures: Failures,
    ) -> dict:
        """The sample of a position, from the first candidate whose image can be decoded.

        Args:
            position: in the stream; with the seed, all that is random follows from it.
            candidates: index and record of this position's image, then of its replacements.
            failures: becomes the sample's; images that cannot be decoded are added.
        """
        smallest_side = self.samples.train_view.smallest_side
        for index, record in itertools.islice(candidates, MAX_REPLACEMENTS):
            try:
                picture = open_picture(record.image_file(), smallest_side)
                sample = self.samples.train(Visit(record, index, picture, position, self.seed))
            except OSError as error:
                failures.append((record.file_name, str(error)))
                continue
            added = {"image_id": record.image_id, "position": position, "failures": failures}
            return {**sample, **added}
        return {"failures": failures}


class ValSet(_Images):
    """Validation samples: all of every image, in order; arguments as of `TrainSet`.

    An image that cannot be decoded is in `failures` of its first sample, and has no other.
    """

    def __init__(self, records: Sequence[CaptionRecord], samples: Samples, seed: int = 0):
        super().__init__(records, samples, seed)
        # (images + 1,) where each image's samples begin: an array, because workers would copy a
        # list (see `pretrain.data.records`)
        self._firsts = offsets(samples.val_counts(records))
        # the image decoded last: its samples follow each other
        self._index = -1
        self._samples: list[dict] = []
        self._failures: Failures = []

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, position: int) -> dict:
        index = int(np.searchsorted(self._firsts, position, side="right")) - 1
        number = position - int(self._firsts[index])
        if index != self._index:
            self._samples, self._failures = self.of_image(index)
            self._index = index
        failures = self._failures if number == 0 else []
        if not self._samples:
            return {"failures": failures}
        return {**self._samples[number], "position": position, "failures": failures}

    def of_image(self, index: int) -> tuple[list[dict], Failures]:
        """All samples of a record, and none where its image cannot be decoded."""
        record = self.records[index]
        try:
            image = read_image(record.image_file(), self.samples.val_view.smallest_side)
        except OSError as error:
            return [], [(record.file_name, str(error))]
        visit = Visit(record, index, image, int(self._firsts[index]), self.seed)
        return [{**one, "image_id": record.image_id} for one in self.samples.val(visit)], []


def collate(samples: list[dict], padding: Mapping[str, int], pin: bool = False) -> dict:
    """Samples -> a batch, without those that are nothing but failures.

    Args:
        samples: of a `TrainSet` or `ValSet`.
        padding: of `Samples`.
        pin: whether images are put together in pinned memory.

    Returns:
        Of N samples: image (N, 3, S, S) uint8, channels last in memory, and other images likewise;
        rows that are padded to the longest (N, T); other tensors stacked; image_id and what else is
        no tensor as a list of N; position (N,) int64. Of all: skipped_files and skipped_reasons,
        lists of equal length, and num_skipped, that length. Where N is 0 there are no images, nor
        rows.
    """
    failures = [failure for sample in samples for failure in sample["failures"]]
    samples = [sample for sample in samples if "position" in sample]
    keys = [key for key in samples[0] if key not in ("position", "failures")] if samples else []
    return {
        "image_id": [],
        **{key: _together([s[key] for s in samples], padding.get(key), pin) for key in keys},
        "position": torch.tensor([sample["position"] for sample in samples], dtype=torch.int64),
        "skipped_files": [path for path, _ in failures],
        "skipped_reasons": [reason for _, reason in failures],
        "num_skipped": len(failures),
    }


def _together(values: list, padding: int | None, pin: bool) -> torch.Tensor | list:
    if not isinstance(values[0], torch.Tensor):
        return values
    if padding is not None:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    return stack_images(values, pin) if is_image(values[0]) else torch.stack(values)


_OF_ALL = ("skipped_files", "skipped_reasons", "num_skipped")


def split_batch(batch: Mapping[str, Any], passes: int) -> list[dict]:
    """A batch of N samples -> batches of N / passes, which share what is of no single sample.

    The first has every passes-th sample from the first one on, as the first of as many processes
    would have.

    Args:
        batch: of `collate`, and single numbers.
        passes: a divisor of N.

    Raises:
        ValueError: a tensor or a list has other than N rows.
    """
    size = len(batch["position"])
    rows = [k for k, v in batch.items() if isinstance(v, torch.Tensor | list) and k not in _OF_ALL]
    for key in rows:
        if len(batch[key]) != size:
            raise ValueError(f"{key} of the batch has {len(batch[key])} rows, not {size}")
    return [
        {**batch, **{key: batch[key][number::passes] for key in rows}} for number in range(passes)
    ]


def is_image(value: object) -> bool:
    """Whether a part of a sample is pixels: (C, H, W)."""
    return isinstance(value, torch.Tensor) and value.ndim == 3


def stack_images(images: Sequence[torch.Tensor], pin: bool = False) -> torch.Tensor:
    """(3, S, S) each, channels last in memory -> (N, 3, S, S), channels last."""
    # as rows of pixels, which lie together: torch.stack of the images as they are is much slower
    rows = [image.permute(1, 2, 0) for image in images]
    memory = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, pin_memory=pin)
    return torch.stack(rows, out=memory).permute(0, 3, 1, 2)


class ImageLoader(DataLoader):
    """A DataLoader that has each batch checked; `full_size`: samples that it must have, or 0."""

    def __init__(self, images: _Images, *args, full_size: int = 0, **options):
        super().__init__(images, *args, collate_fn=images.samples.collate, **options)
        self._full_size = full_size

    def __iter__(self) -> Iterator[dict]:
        for batch in batches_of(super().__iter__):
            self.dataset.check(batch, self._full_size)
            yield batch


@dataclass(frozen=True)
class _Positions:
    """The positions of one process, an iteration after the other, without an end."""

    batch_size_total: int
    start_iteration: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in itertools.count(self.start_iteration):
            first = iteration * self.batch_size_total
            yield list(range(first + self.rank, first + self.batch_size_total, self.world_size))


def build_train_loader(
    train: TrainSet,
    batch_size_total: int,
    start_iteration: int = 0,
    num_workers: int = 0,
    pin: bool = False,
) -> ImageLoader:
    """Load endless batches of this process.

    Args:
        batch_size_total: over all processes.
        start_iteration: the number of iterations done.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    return ImageLoader(
        train,
        batch_sampler=_Positions(batch_size_total, start_iteration, rank, world_size),
        full_size=len(range(rank, batch_size_total, world_size)),
        **loader_options(num_workers, pin),
    )


def build_val_loader(
    val: ValSet, batch_size: int, num_workers: int = 0, pin: bool = False
) -> ImageLoader:
    """Load every sample once over all processes, in batches of `batch_size` each.

    Each process takes a stretch of neighbours, so that an image is decoded once and not for each
    of its samples.
    """
    share, extra = divmod(len(val), comm.get_world_size())
    rank = comm.get_rank()
    first = rank * share + min(rank, extra)
    positions = range(first, first + share + (rank < extra))
    return ImageLoader(val, batch_size, sampler=positions, **loader_options(num_workers, pin))


def loader_options(num_workers: int, pin: bool) -> dict:
    """DataLoader's arguments wherever images are loaded; `pin` for a GPU."""
    return {
        "num_workers": num_workers,
        "pin_memory": pin,
        "worker_init_fn": _start_worker,
        "prefetch_factor": 2 if num_workers else None,  # more fills /dev/shm
    }


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # a worker is a thread's worth of work: more would fight each other
    start_worker()
