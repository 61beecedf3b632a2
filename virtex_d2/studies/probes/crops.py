"""Images -> pixels: the central crop for features and tests, a random one for training."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

# How many images in a row may fail to decode before the data is given up.
MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class CentralCrop:
    """Shorter side to `resize`, central `size` x `size`, bilinear with antialiasing.

    Attributes:
        resize, size: pixels.
        channel_order: "RGB" or "BGR", of the result.
    """

    resize: int = 256
    size: int = 224
    channel_order: str = "RGB"

    # To be raised with any change of the pixels: features in caches are of one version.
    version = 1

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, size, size) uint8."""
        image = tvf.resize(image, self.resize, InterpolationMode.BILINEAR)
        return _pixels(tvf.center_crop(image, [self.size, self.size]), self.channel_order)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and a flip half of the time, as a function of a seed.

    Attributes:
        size: pixels.
        scale, ratio: ranges of the area kept (fraction) and of the aspect ratio.
        channel_order: "RGB" or "BGR", of the result.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    channel_order: str = "RGB"

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """RGB image -> (3, size, size) uint8."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(
                image, list(self.scale), list(self.ratio)
            )
            is_flipped = bool(torch.rand(()) < 0.5)
        size = [self.size, self.size]
        image = tvf.resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
        return _pixels(tvf.hflip(image) if is_flipped else image, self.channel_order)


def _pixels(image: Image.Image, channel_order: str) -> torch.Tensor:
    pixels = tvf.pil_to_tensor(image)
    return pixels if channel_order == "RGB" else pixels.flip(0)


class CentralCrops(Dataset):
    """Some of a list's images: {"index", "input"}, or {"index", "unusable": reason}."""

    def __init__(self, files: Sequence[str], indices: Sequence[int], crop: CentralCrop):
        self._files = files
        self._indices = indices
        self._crop = crop

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> dict:
        index = self._indices[place]
        try:
            return {"index": index, "input": self._crop(read_image(self._files[index]))}
        except OSError as error:  # as data: from a worker it would arrive as a traceback
            return {"index": index, "unusable": str(error)}


def central_batches(
    files: Sequence[str],
    indices: Sequence[int],
    crop: CentralCrop,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[list[int], torch.Tensor | None, dict[int, str]]]:
    """Indices and pixels (N, 3, S, S) of usable images, and reasons by index for the others.

    In the order of `indices`; pixels are None where nothing of a batch is usable.
    """
    loader = DataLoader(
        CentralCrops(files, indices, crop),
        batch_size=batch_size,
        collate_fn=list,
        **loader_options(num_workers),
    )
    for samples in batches_of(lambda: iter(loader)):
        usable = [sample for sample in samples if "input" in sample]
        pixels = torch.stack([sample["input"] for sample in usable]) if usable else None
        unusable = {s["index"]: s["unusable"] for s in samples if "unusable" in s}
        yield [sample["index"] for sample in usable], pixels, unusable


class RandomCrops(Dataset):
    """Training samples by position in an endless stream; each is a function of (seed, position).

    Position p is image p % N of epoch p // N, in that epoch's order. An image that cannot be
    decoded is replaced by the next one of the order, so that batches keep their size.

    A sample has "input" (3, S, S) uint8, "label", and "unusable": [(file, reason), ...] of images
    that it stands in for; where `MAX_REPLACEMENTS` in a row fail, that is all.
    """

    def __init__(self, files: Sequence[str], labels: np.ndarray, crop: RandomCrop, seed: int):
        self._files = files
        self._labels = labels
        self._crop = crop
        self._order = EpochOrder(len(files), seed)
        self._seed = seed

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self._files))
        order = self._order(epoch)
        unusable = []
        for step in range(min(MAX_REPLACEMENTS, len(order))):
            index = order[(place + step) % len(order)]
            try:
                image = read_image(self._files[index])
            except OSError as error:
                unusable.append((self._files[index], str(error)))
                continue
            seed = np.random.SeedSequence([self._seed, 1, position]).generate_state(1, np.uint64)
            pixels = self._crop(image, int(seed[0] >> 1))
            return {"input": pixels, "label": int(self._labels[index]), "unusable": unusable}
        return {"unusable": unusable}


class EpochOrder:
    """Epoch -> its permutation of `size` images; a function of (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # a batch may span two epochs
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            rng = np.random.default_rng([self._seed, 0, epoch])
            self._orders[epoch] = rng.permutation(self._size)
        return self._orders[epoch]


def positions(
    batch_size_total: int, start_iteration: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """The positions of one process, an iteration after the other, without an end."""
    first = start_iteration * batch_size_total
    while True:
        yield list(range(first + rank, first + batch_size_total, world_size))
        first += batch_size_total


class RandomBatches:
    """Endless training batches of this process: {"input", "label"}.

    Args:
        dataset: of random crops.
        batch_size_total: over all processes.
        start_iteration: the first batch's.
        num_workers: processes that decode.
        max_skipped: so many of the images may be unusable.
    """

    def __init__(
        self,
        dataset: RandomCrops,
        batch_size_total: int,
        start_iteration: int,
        num_workers: int,
        max_skipped: float,
    ):
        self._loader = DataLoader(
            dataset,
            batch_sampler=positions(
                batch_size_total, start_iteration, comm.get_rank(), comm.get_world_size()
            ),
            collate_fn=list,
            **loader_options(num_workers),
        )
        self._max_skipped = max_skipped
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for samples in batches_of(lambda: iter(self._loader)):
            for sample in samples:
                for file, reason in sample["unusable"]:
                    self._note(file, reason)
                if "input" not in sample:
                    raise InputError(refusal(self.skipped, "training images in a row"))
            yield {
                "input": torch.stack([sample["input"] for sample in samples]),
                "label": torch.tensor([sample["label"] for sample in samples]),
            }

    def _note(self, file: str, reason: str) -> None:
        if file in self.skipped:
            return
        self.skipped[file] = reason
        logger.warning("%s: skipped, another image takes its place (%s)", file, reason)
        if len(self.skipped) > self._max_skipped:
            raise InputError(
                refusal(self.skipped, "training images, more than DATA.MAX_SKIPPED_SHARE allows,")
            )


def refusal(unusable: dict[str, str], what: str) -> str:
    """The message about images that cannot be decoded: how many, and the first ten."""
    first = "; ".join(f"{file} ({reason})" for file, reason in list(unusable.items())[:10])
    return (
        f"{len(unusable)} {what} cannot be decoded: {first}. Copy them again, or take them out of "
        "the data set."
    )


def loader_options(num_workers: int) -> dict:
    """DataLoader's arguments wherever images are loaded."""
    return {
        "num_workers": num_workers,
        "pin_memory": False,  # batches are lists of samples, which are stacked behind it
        "worker_init_fn": _start_worker,
        "prefetch_factor": 2 if num_workers else None,
    }


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    start_worker()
