"""Features of images under a frozen network: computed once, and kept by what they depend on."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.utils import comm

from virtex_d2.checkpoint.probe import exact_float32
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors
from virtex_d2.studies.probes.crops import CentralCrop, central_batches, refusal
from virtex_d2.studies.probes.network import PooledResNet, fingerprint, require_untouched

logger = logging.getLogger(__name__)

FORMAT = "virtex_d2.features.1"
# Images of a file. An extraction that was stopped goes on with the first file that is not there.
SHARD_SIZE = 4096
_LOG_SECONDS = 20.0


@dataclass(frozen=True)
class Features:
    """Pooled features of a list of images.

    Attributes:
        values: (N, D) float32; rows of unusable images are zeros.
        unusable: reason by index of the images that cannot be decoded.
    """

    values: torch.Tensor
    unusable: dict[int, str]


@dataclass(frozen=True)
class Extraction:
    """How features are computed. What changes them is in the cache's key; the rest is not.

    Attributes:
        network: in evaluation mode; its tensors, sizes and preprocessing are in the key.
        stride_in_1x1: of its bottlenecks, which no tensor shows; in the key.
        crop: in the key.
        cache_dir: the folder of all caches.
        batch_size, num_workers: for speed alone.
    """

    network: PooledResNet
    stride_in_1x1: bool
    crop: CentralCrop
    cache_dir: str
    batch_size: int = 64
    num_workers: int = 0

    def __call__(self, files: Sequence[str], name: str = "images") -> Features:
        """The features of image files, from the cache where they are in it.

        With several processes each computes every so many-th file of the cache, and reads all.

        Args:
            files: their paths.
            name: of the list, for the log.

        Raises:
            RuntimeError: the network changed while it was used.
        """
        before = fingerprint(self.network)
        folder = Path(self.cache_dir) / self._key(files, before)
        shards = [
            _Shard(folder / f"{first // SHARD_SIZE:05}.safetensors", first, last)
            for first in range(0, len(files), SHARD_SIZE)
            for last in [min(first + SHARD_SIZE, len(files))]
        ]
        mine = shards[comm.get_rank() :: comm.get_world_size()]
        known = {shard: shard.read() for shard in mine}
        absent = [shard for shard, found in known.items() if found is None]
        if absent:
            self._extract(files, absent, name)
            require_untouched(self.network, before)
        else:
            logger.info("Features of %d %s: cached in %s", len(files), name, folder)
        comm.synchronize()
        parts = [known.get(shard) or shard.read() for shard in shards]
        if any(part is None for part in parts):
            raise InputError(
                f"{folder}: features that were just written are gone. DATA.CACHE_DIR must be one "
                "folder that all processes share, and nobody may empty it during a run."
            )
        unusable = {index: reason for part in parts for index, reason in part.unusable.items()}
        return Features(torch.cat([part.values for part in parts]), unusable)

    def _key(self, files: Sequence[str], tensors: str) -> str:
        """What the features depend on, hashed: network, pixels, and every image file's state."""
        digest = hashlib.sha256()
        network = self.network
        constants = (network.pixel_mean.flatten().tolist(), network.pixel_std.flatten().tolist())
        pixels = (*astuple(self.crop), self.crop.version)
        parts = (FORMAT, tensors, self.stride_in_1x1, constants, pixels, SHARD_SIZE)
        digest.update(json.dumps(parts).encode())
        for file in files:
            path = os.path.realpath(file)
            try:
                status = os.stat(path)
            except OSError:
                state = [path, None, None]  # unusable; and another key once it is there
            else:
                state = [path, status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(state).encode())
        return digest.hexdigest()[:32]

    def _extract(self, files: Sequence[str], shards: Sequence["_Shard"], name: str) -> None:
        progress = _Progress(sum(len(shard) for shard in shards), name)
        for shard in shards:
            features = self._compute(files, shard, progress)
            try:
                shard.write(features)
            except OSError as error:
                raise InputError(
                    f"DATA.CACHE_DIR {self.cache_dir}: cannot be written: {error.strerror}. "
                    "Choose another."
                ) from error
        progress.done()

    @torch.no_grad()
    def _compute(self, files: Sequence[str], shard: "_Shard", progress: "_Progress") -> Features:
        network = self.network
        device = network.pixel_mean.device
        values = torch.zeros(len(shard), network.feature_size)
        unusable: dict[int, str] = {}
        indices = range(shard.first, shard.last)
        batches = central_batches(files, indices, self.crop, self.batch_size, self.num_workers)
        # TensorFloat-32 would make features of one GPU others than those of another or of a CPU
        with exact_float32():
            for found, pixels, reasons in batches:
                unusable |= reasons
                if pixels is not None:
                    rows = torch.tensor(found) - shard.first
                    values[rows] = network(pixels.to(device)).cpu()
                progress.add(len(found) + len(reasons))
        if not torch.isfinite(values).all():
            raise InputError(
                "MODEL.WEIGHTS: the network's features are not finite; its weights or running "
                "statistics cannot be those of a trained network."
            )
        return Features(values, unusable)


@dataclass(frozen=True)
class _Shard:
    """Images `first` to `last` of a list, in a file."""

    path: Path
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def write(self, features: Features) -> None:
        metadata = {
            "format": FORMAT,
            "sha256": _sha256(features.values),
            "unusable": json.dumps(features.unusable),
        }
        write_safetensors(self.path, {"features": features.values}, metadata)

    def read(self) -> Features | None:
        """None where there is no file, or where it is damaged, which is logged."""
        if not self.path.is_file():
            return None
        try:
            tensors, metadata = read_safetensors(self.path)
            values = tensors["features"]
            if metadata["format"] != FORMAT or len(values) != len(self):
                raise ValueError("it holds other features")
            if _sha256(values) != metadata["sha256"]:
                raise ValueError("its checksum is wrong")
            reasons = json.loads(metadata["unusable"])
        except (InputError, ValueError, KeyError) as error:
            logger.warning("%s: a damaged cache of features, made anew (%s)", self.path, error)
            return None
        return Features(values, {int(index): reason for index, reason in reasons.items()})


class _Progress:
    """Says in the log, now and then, how far an extraction is and how long it will take."""

    def __init__(self, total: int, name: str):
        self._total = total
        self._name = name
        self._count = 0
        self._start = self._last = time.perf_counter()

    def add(self, count: int) -> None:
        self._count += count
        now = time.perf_counter()
        if now - self._last >= _LOG_SECONDS:
            self._last = now
            rate = self._count / (now - self._start)
            left = timedelta(seconds=round((self._total - self._count) / rate))
            logger.info(
                "Features of %d of %d %s, %.1f images/s, eta: %s",
                *(self._count, self._total, self._name, rate, left),
            )

    def done(self) -> None:
        seconds = time.perf_counter() - self._start
        logger.info(
            "Features of %d %s computed in %s",
            self._count,
            self._name,
            timedelta(seconds=round(seconds)),
        )


def usable_rows(
    features: Features, files: Sequence[str], max_share: float, what: str
) -> torch.Tensor:
    """The rows of images that could be decoded, in order; names the others in the log.

    Args:
        features: of `files`.
        max_share: the fraction that may be unusable; 0 where every image counts.
        what: "training" or "test".
    """
    named = {files[index]: reason for index, reason in features.unusable.items()}
    if len(named) > max_share * len(files):
        key = " (DATA.MAX_SKIPPED_SHARE)" if what == "training" else ""
        raise InputError(refusal(named, f"of {len(files)} {what} images{key}"))
    for file, reason in named.items():
        logger.warning("%s: left out of the %s images (%s)", file, what, reason)
    kept = [index for index in range(len(files)) if index not in features.unusable]
    return torch.tensor(kept, dtype=torch.int64)


def normalized(values: torch.Tensor) -> torch.Tensor:
    """Rows of unit L2 norm; a row of zeros stays one."""
    return torch.nn.functional.normalize(values, dim=1)


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy()).hexdigest()
