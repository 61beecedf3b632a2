"""The network under test, and its features: computed once, and kept by what they depend on."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from torch import nn
from torch.nn import functional as F

from virtex_d2.checkpoint.probe import exact_float32
from virtex_d2.checkpoint.starts import STARTS, is_random, start_at_random
from virtex_d2.checkpoint.transfer import apply_preprocessing, load_backbone, open_weights
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors, write_safetensors
from virtex_d2.engine.frozen import fingerprint, require_untouched
from virtex_d2.studies.probes.data import CentralCrop, LabelledImages, central_batches, refusal

logger = logging.getLogger(__name__)

FORMAT = "virtex_d2.features.1"
# Images of a file. An extraction that was stopped goes on with the first file that is not there.
SHARD_SIZE = 4096
_LOG_SECONDS = 20


class PooledResNet(nn.Module):
    """detectron2's ResNet: its OUT_FEATURES, averaged over all positions, one behind another.

    Args:
        cfg: of `get_probe_cfg`, completed by `complete_config`.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone: ResNet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        shapes = self.backbone.output_shape()
        self.sizes = {name: shapes[name].channels for name in cfg.MODEL.RESNETS.OUT_FEATURES}
        self.feature_size = sum(self.sizes.values())
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W), channels in INPUT.FORMAT's order -> (N, feature_size)."""
        maps = self.backbone((images - self.pixel_mean) / self.pixel_std)
        return torch.cat([maps[name].mean((2, 3)) for name in self.sizes], dim=1)


class Classifier(nn.Module):
    """A linear layer on features, which are given or come from images.

    Its weights start at N(0, 0.01), its bias at 0 (the released code of arXiv 2006.06666).

    Args:
        feature_size: of the features.
        num_classes: outputs.
        network: makes features of images; None where features are given.
        frozen: whether the network stays as it is: evaluation mode, without gradients.
        amp: whether to compute under bfloat16 autocast.
    """

    def __init__(
        self,
        feature_size: int,
        num_classes: int,
        network: PooledResNet | None = None,
        frozen: bool = True,
        amp: bool = False,
    ):
        super().__init__()
        self.fc = nn.Linear(feature_size, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.network = network
        self.frozen = frozen
        self.amp = amp
        if network is not None and frozen:
            network.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        """As always, but a frozen network stays in evaluation mode: its norms keep their data."""
        super().train(mode)
        if self.network is not None and self.frozen:
            self.network.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """{"input": images or features, "label": (N,)} -> {"loss_cls": scalar} in training, else
        the logits (N, num_classes), float32.
        """
        x = batch["input"].to(self.fc.weight.device, non_blocking=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            if self.network is not None:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                    x = self.network(x)
            logits = self.fc(x).float()
        if not self.training:
            return logits
        return {"loss_cls": F.cross_entropy(logits, batch["label"].to(x.device))}


def complete_config(cfg: CfgNode) -> list[str]:
    """Set the keys of MODEL.RESNETS and of the preprocessing from MODEL.WEIGHTS, in place.

    Returns:
        A line for the log about each preprocessing key that was changed.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError(
            "MODEL.WEIGHTS is empty; expected a checkpoint with a ResNet, or for one of random "
            f"weights {' or '.join(STARTS)}."
        )
    if is_random(cfg.MODEL.WEIGHTS):
        return []
    source, virtex = open_weights(cfg), cfg.VIRTEX
    backbone = source.backbone(virtex.LAYOUT, virtex.COPY, virtex.PREFIX)
    for key, value in backbone.architecture.config().items():
        cfg.MODEL.RESNETS[key.rpartition(".")[2]] = value
    return apply_preprocessing(cfg, source)


def build_network(cfg: CfgNode) -> tuple[PooledResNet, dict[str, Any]]:
    """Build the network on MODEL.DEVICE, in evaluation mode; the second is for results.json."""
    torch.manual_seed(cfg.SEED)
    try:
        network = PooledResNet(cfg)
    except (AssertionError, KeyError) as error:  # detectron2's words for a size that it lacks
        raise InputError(f"MODEL.RESNETS: detectron2 cannot build this ResNet: {error}.") from error
    about: dict[str, Any] = {"weights": cfg.MODEL.WEIGHTS}
    if is_random(cfg.MODEL.WEIGHTS):
        start_at_random(network, cfg.MODEL.WEIGHTS)
        about["seed"] = cfg.SEED
    else:
        report = load_backbone(network, open_weights(cfg), cfg)
        about |= {key: getattr(report, key) for key in ("sha256", "layout", "copy", "architecture")}
        about["notes"] = list(report.notes)
    return network.to(cfg.MODEL.DEVICE).eval(), {**about, "tensors_sha256": fingerprint(network)}


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
        """Give the features of image files, from the cache where they are in it.

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

    def labelled(
        self, images: LabelledImages, what: str, max_share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give features and labels of the images that can be decoded, on the CPU, in order; name
        the others in the log.

        Args:
            images: the set.
            what: "training" or "test".
            max_share: the fraction that may be unusable; 0 where every image counts.
        """
        files = images.files
        features = self(files, f"{what} images")
        labels = torch.from_numpy(images.labels)
        if not features.unusable:  # no copy of what may be ten gigabytes
            return features.values, labels
        named = {files[index]: reason for index, reason in features.unusable.items()}
        if len(named) > max_share * len(files):
            key = " (DATA.MAX_SKIPPED_SHARE)" if what == "training" else ""
            raise InputError(refusal(named, f"of {len(files)} {what} images{key}"))
        for file, reason in named.items():
            logger.warning("%s: left out of the %s images (%s)", file, what, reason)
        kept = torch.tensor([i for i in range(len(files)) if i not in features.unusable])
        return features.values[kept], labels[kept]

    def _key(self, files: Sequence[str], tensors: str) -> str:
        """What the features depend on, hashed: network, pixels, and every image file's state."""
        digest = hashlib.sha256()
        network = self.network
        constants = (network.pixel_mean.flatten().tolist(), network.pixel_std.flatten().tolist())
        pixels = (*astuple(self.crop), self.crop.version)
        parts = (FORMAT, tensors, self.stride_in_1x1, constants, pixels, SHARD_SIZE)
        if list(network.sizes) != ["res5"]:
            parts += (list(network.sizes),)
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
        start = time.perf_counter()
        total = sum(len(shard) for shard in shards)
        done = 0
        for shard in shards:
            values = torch.zeros(len(shard), self.network.feature_size)
            unusable: dict[int, str] = {}
            indices = range(shard.first, shard.last)
            for found, pixels, reasons in central_batches(
                files, indices, self.crop, self.batch_size, self.num_workers
            ):
                unusable |= reasons
                if pixels is not None:
                    values[torch.tensor(found) - shard.first] = self._compute(pixels)
                done += len(found) + len(reasons)
                rate = done / (time.perf_counter() - start)
                left = timedelta(seconds=round((total - done) / rate))
                told = f"Features of {done} of {total} {name}, {rate:.1f} images/s, eta: {left}"
                log_every_n_seconds(logging.INFO, told, _LOG_SECONDS)
            if not torch.isfinite(values).all():
                raise InputError(
                    "MODEL.WEIGHTS: the network's features are not finite; its weights or running "
                    "statistics cannot be those of a trained network."
                )
            try:
                shard.write(Features(values, unusable))
            except OSError as error:
                raise InputError(
                    f"DATA.CACHE_DIR {self.cache_dir}: cannot be written: {error.strerror}. "
                    "Choose another."
                ) from error
        seconds = timedelta(seconds=round(time.perf_counter() - start))
        logger.info("Features of %d %s computed in %s", done, name, seconds)

    @torch.no_grad()
    def _compute(self, pixels: torch.Tensor) -> torch.Tensor:
        # TensorFloat-32 would make features of one GPU others than those of another or of a CPU
        with exact_float32():
            return self.network(pixels.to(self.network.pixel_mean.device)).cpu()


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


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy()).hexdigest()
