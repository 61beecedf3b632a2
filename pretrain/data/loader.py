"""Samples and batches. A sample is a pure function of (seed, position).

Position p of the endless training stream is image p % len of epoch p // len, in that epoch's order;
`order.py` says which, and mixes several sources. The order and everything random in a sample
follow from (seed, epoch) and (seed, position) alone: not from the number of workers, processes or
restarts. Iteration i takes the positions from i * batch on, and process r of W every W-th of them.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.data.order import Stream, generator, order_of
from pretrain.data.records import CaptionRecord, caption_counts, offsets
from pretrain.jpeg import open_picture
from pretrain.methods.captioning.targets import SampleTarget
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.transforms import EvalTransform, TrainTransform
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

# How many images in a row may fail to decode before the data is given up.
MAX_REPLACEMENTS = 100

# How many files are named in the log; what a stream skips has no end.
MAX_NAMED = 10_000

# Of what targets add: what stands behind the shorter rows of a batch.
_PADDING = {"masked_tokens": Tokenizer.pad_id, "masked_labels": Tokenizer.pad_id, "labels": -1}

# Path and reason of images that could not be decoded.
Failures = list[tuple[str, str]]


class CaptionDataset(Dataset):
    """Training samples by position; images with one caption drawn for each visit.

    `dataset[position]` is a dict with
        image           (3, S, S) uint8, RGB, channels last in memory
        jitter          (4, 2) float32, what the device does to its colours (`pretrain.transforms`)
        caption_tokens  (T,) int64: [SOS] pieces [EOS], T <= max_length; a caption that is too long
                        loses its end and keeps its [EOS]
        image_id        of the record
        position        as asked for
        failures        (path, reason) of images that could not be decoded on the way
    and what `targets` add.

    An image that cannot be decoded is replaced by the next one of the epoch's order, and that by
    its next: batches keep their size, and the sample stays a function of the position. Where
    `MAX_REPLACEMENTS` in a row (or all) fail, `failures` is all there is.

    Args:
        records: at least one; `MixedRecords` are drawn by their weights.
        tokenizer: makes the tokens.
        transform: makes the pixels.
        max_length: tokens of a caption, [SOS] and [EOS] included.
        seed: not negative.
        targets: what the objective wants besides (`pretrain.methods.captioning.targets`).
    """

    def __init__(
        self,
        records: Sequence[CaptionRecord],
        tokenizer: Tokenizer,
        transform: TrainTransform | EvalTransform,
        max_length: int = 30,
        seed: int = 0,
        targets: Sequence[SampleTarget] = (),
    ):
        if max_length < 3:
            raise InputError(
                f"MODEL.TEXTUAL.MAX_LENGTH {max_length}: a caption has [SOS], [EOS] and at least "
                "one piece; use 3 or more."
            )
        self.records = records
        self.tokenizer = tokenizer
        self.transform = transform
        self.max_length = max_length
        self.seed = seed
        self.targets = targets
        self.order = order_of(records, seed)
        self._named: set[str] = set()

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
        for index, record in itertools.islice(candidates, MAX_REPLACEMENTS):
            # a new one for each: a file may turn out to be damaged after its crop has been drawn
            rng = generator(self.seed, Stream.SAMPLE, position)
            caption = record.captions[rng.integers(len(record.captions))]
            try:
                picture = open_picture(record.image_file(), self.transform.smallest_side)
                pixels, caption, jitter = self.transform(picture, caption, rng)
            except OSError as error:
                failures.append((record.file_name, str(error)))
                continue
            sample = self.sample(index, record.image_id, position, pixels, caption, failures)
            return {**sample, "jitter": jitter}
        return {"failures": failures}

    def sample(
        self,
        index: int | None,
        image_id: int | str,
        position: int,
        pixels: torch.Tensor,
        caption: str,
        failures: Failures,
    ) -> dict:
        """The sample of record `index` (None: of a stream), with what targets draw for it."""
        sample = {
            "image": pixels,
            "caption_tokens": torch.tensor(self.encode(caption)),
            "image_id": image_id,
            "position": position,
            "failures": failures,
        }
        for target in self.targets:
            target.extend(sample, index, generator(self.seed, target.stream, position))
        return sample

    def read(self, record: CaptionRecord, failures: Failures) -> Image.Image | None:
        """The record's whole image; None where there is none, and a line more in `failures`."""
        try:
            return read_image(record.image_file(), self.transform.smallest_side)
        except OSError as error:
            failures.append((record.file_name, str(error)))
            return None

    def encode(self, caption: str) -> list[int]:
        """[SOS] pieces [EOS], at most `max_length` of them."""
        pieces = self.tokenizer.encode(caption)[: self.max_length - 2]
        return [self.tokenizer.sos_id, *pieces, self.tokenizer.eos_id]

    def name_once(self, path: str, reason: str) -> None:
        """Log a file that could not be used, the first time that it is met."""
        if path not in self._named and len(self._named) < MAX_NAMED:
            self._named.add(path)
            logger.warning("%s: it cannot be used and is skipped: %s", path, reason)


class EveryCaption(Dataset):
    """Validation samples: every caption of every image once (or its first one alone), in order.

    An image that cannot be decoded is in `failures` of its first caption, and no sample has it.
    """

    def __init__(self, dataset: CaptionDataset, one_caption: bool = False):
        self._dataset = dataset
        counts = caption_counts(dataset.records)
        # (images + 1,) where each image's captions begin: an array, because workers would copy a
        # list (see `pretrain.data.records`)
        self._firsts = offsets(np.minimum(counts, 1) if one_caption else counts)
        # the image decoded last: its captions follow each other
        self._index = -1
        self._pixels: torch.Tensor | None = None
        self._failures: Failures = []

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, position: int) -> dict:
        index = int(np.searchsorted(self._firsts, position, side="right")) - 1
        number = position - int(self._firsts[index])
        record = self._dataset.records[index]
        if index != self._index:
            self._index, self._failures = index, []
            image = self._dataset.read(record, self._failures)
            self._pixels = None if image is None else self._dataset.transform(image, "", None)[0]
        failures = self._failures if number == 0 else []
        if self._pixels is None:
            return {"failures": failures}
        caption = record.captions[number]
        return self._dataset.sample(
            index, record.image_id, position, self._pixels, caption, failures
        )


def collate(samples: list[dict], pin: bool = False) -> dict:
    """Samples -> a batch; `pin`: its images in pinned memory.

    Returns:
        image (N, 3, S, S) uint8, channels last in memory; caption_tokens (N, T) int64, padded with
        0 to the longest; caption_lengths (N,) int64; position (N,) int64; image_id, a list of N;
        skipped_files and skipped_reasons, lists of equal length; num_skipped, that length; and of
        what targets add, rows padded to the longest; jitter (N, 4, 2) float32 of training samples.
        N leaves out samples that are nothing but failures.
    """
    failures = [failure for sample in samples for failure in sample["failures"]]
    samples = [sample for sample in samples if "image" in sample]
    images = [sample["image"] for sample in samples]
    tokens = [sample["caption_tokens"] for sample in samples]
    added = {
        key: torch.nn.utils.rnn.pad_sequence(
            [sample[key] for sample in samples], batch_first=True, padding_value=padding
        )
        for key, padding in _PADDING.items()
        if samples and key in samples[0]
    }
    for key in ("parallel", "jitter"):
        if samples and key in samples[0]:
            added[key] = torch.stack([sample[key] for sample in samples])
    return {
        "image": stack_images(images, pin)
        if images
        else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        "caption_tokens": torch.nn.utils.rnn.pad_sequence(
            tokens, batch_first=True, padding_value=Tokenizer.pad_id
        )
        if tokens
        else torch.empty(0, 0, dtype=torch.int64),
        "caption_lengths": torch.tensor([len(row) for row in tokens], dtype=torch.int64),
        "position": torch.tensor([sample["position"] for sample in samples], dtype=torch.int64),
        "image_id": [sample["image_id"] for sample in samples],
        "skipped_files": [path for path, _ in failures],
        "skipped_reasons": [reason for _, reason in failures],
        "num_skipped": len(failures),
        **added,
    }


def stack_images(images: Sequence[torch.Tensor], pin: bool = False) -> torch.Tensor:
    """(3, S, S) each, channels last in memory -> (N, 3, S, S), channels last."""
    # as rows of pixels, which lie together: torch.stack of the images as they are is much slower
    rows = [image.permute(1, 2, 0) for image in images]
    memory = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, pin_memory=pin)
    return torch.stack(rows, out=memory).permute(0, 3, 1, 2)


class CaptionLoader(DataLoader):
    """A DataLoader that names in the log each file that could not be decoded, once.

    That is done here, in the process that trains: workers know neither each other nor, where they
    are not forked, how the log is set up.

    Args:
        named_by: the dataset that remembers which files have been named.
        full_size: samples that every batch must have; 0 where it may lack some.
    """

    def __init__(self, *args, named_by: CaptionDataset, full_size: int = 0, **options):
        super().__init__(*args, **options)
        self._named_by = named_by
        self._full_size = full_size

    def __iter__(self) -> Iterator[dict]:
        for batch in batches_of(super().__iter__):
            check_batch(batch, self._named_by, self._full_size)
            yield batch


def check_batch(batch: dict, named_by: CaptionDataset, full_size: int) -> None:
    """Name what could not be used; arguments as of `CaptionLoader`."""
    for path, reason in zip(batch["skipped_files"], batch["skipped_reasons"]):
        named_by.name_once(path, reason)
    if len(batch["position"]) < full_size:
        raise InputError(
            f"{batch['skipped_files'][0]}: neither this image nor those after it in the order (at "
            f"most {MAX_REPLACEMENTS} are tried) can be used: {batch['skipped_reasons'][0]}."
        )


class _Positions(Sampler):
    """The positions of one process, an iteration after the other, without an end."""

    def __init__(self, batch_size_total: int, start_iteration: int, rank: int, world_size: int):
        self._batch_size_total = batch_size_total
        self._start_iteration = start_iteration
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self._start_iteration
        while True:
            first = iteration * self._batch_size_total
            yield list(range(first + self._rank, first + self._batch_size_total, self._world_size))
            iteration += 1


def build_train_loader(
    dataset: CaptionDataset,
    batch_size_total: int,
    start_iteration: int = 0,
    num_workers: int = 0,
    pin: bool = False,
) -> CaptionLoader:
    """Load endless batches from an iteration on; `batch_size_total` is over all processes."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    return CaptionLoader(
        dataset,
        batch_sampler=_Positions(batch_size_total, start_iteration, rank, world_size),
        named_by=dataset,
        full_size=len(range(rank, batch_size_total, world_size)),
        **loader_options(num_workers, pin),
    )


def build_eval_loader(
    dataset: CaptionDataset,
    batch_size: int,
    num_workers: int = 0,
    one_caption: bool = False,
    pin: bool = False,
) -> CaptionLoader:
    """Every caption of every image once over all processes, in batches of `batch_size` each.

    Each process takes a stretch of neighbours, so that an image is decoded once and not for each
    of its captions. With `one_caption` the first one of each image stands for all.
    """
    captions = EveryCaption(dataset, one_caption)
    share, extra = divmod(len(captions), comm.get_world_size())
    rank = comm.get_rank()
    first = rank * share + min(rank, extra)
    return CaptionLoader(
        captions,
        batch_size,
        sampler=range(first, first + share + (rank < extra)),
        named_by=dataset,
        **loader_options(num_workers, pin),
    )


def loader_options(num_workers: int, pin: bool) -> dict:
    """DataLoader's arguments wherever captioned images are loaded; `pin` for a GPU."""
    return {
        "collate_fn": collate,
        "num_workers": num_workers,
        "pin_memory": pin,
        "worker_init_fn": _start_worker,
        "prefetch_factor": 2 if num_workers else None,  # more fills /dev/shm
    }


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # a worker is a thread's worth of work: more would fight each other
    start_worker()
