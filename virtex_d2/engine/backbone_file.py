"""The one file between the packages: a ResNet in torchvision's names, and how it must be fed.

A safetensors file of float32 tensors, running statistics included, whose metadata say what a
detector has to know: architecture, channel order, mean, std and where the stride is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import virtex_d2
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import write_safetensors

if TYPE_CHECKING:
    import torch

FORMAT = "virtex_d2.backbone"
VERSION = "1"
# torchvision's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), RGB, x 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

ORDER, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
_REQUIRED = ("architecture", "channel_order", "pixel_mean", "pixel_std", "stride_in_1x1")
_ADVICE = "tools/pretrain_net.py and tools/convert_checkpoint.py write such files."


@dataclass(frozen=True)
class Preprocessing:
    """What was done to pixels before the network saw them."""

    channel_order: str  # "RGB" or "BGR"
    # mean, std: per channel in that order, on the scale 0 to 255
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # whether a bottleneck halves the resolution in its first 1x1 convolution (MSRA's networks) or
    # in the 3x3 one (torchvision's and all later ones)
    stride_in_1x1: bool

    def config(self) -> dict[str, object]:
        """The four config keys that feed a detector so."""
        return {
            ORDER: self.channel_order,
            MEAN: list(self.mean),
            STD: list(self.std),
            STRIDE: self.stride_in_1x1,
        }

    @classmethod
    def of_config(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The other way of `config`."""
        mean, std = (tuple(map(float, values[key])) for key in (MEAN, STD))
        return cls(values[ORDER], mean, std, values[STRIDE])

    def metadata(self) -> dict[str, str]:
        """The same as strings, for files."""
        return {
            "channel_order": self.channel_order,
            "pixel_mean": ",".join(map(str, self.mean)),
            "pixel_std": ",".join(map(str, self.std)),
            "stride_in_1x1": str(self.stride_in_1x1).lower(),
        }


IMAGENET_RGB = Preprocessing("RGB", IMAGENET_MEAN, IMAGENET_STD, False)


def backbone_metadata(architecture: str, preprocessing: Preprocessing) -> dict[str, str]:
    """What makes a safetensors file a backbone file; further entries may stand beside it."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "architecture": architecture,
        **preprocessing.metadata(),
        "virtex_d2_version": virtex_d2.__version__,
    }


def write_backbone(
    path: str | os.PathLike,
    tensors: "Mapping[str, torch.Tensor]",
    architecture: str,
    preprocessing: Preprocessing,
    metadata: Mapping[str, str],
) -> None:
    """Write a backbone file, atomically; `metadata` are further entries."""
    write_safetensors(path, tensors, {**metadata, **backbone_metadata(architecture, preprocessing)})


def is_backbone_file(metadata: Mapping[str, str]) -> bool:
    """Whether metadata of a safetensors file are those of a backbone file."""
    return metadata.get("format") == FORMAT


def preprocessing_of(path: str, metadata: Mapping[str, str]) -> Preprocessing:
    """How the network of a backbone file must be fed."""
    if metadata.get("format_version") != VERSION:
        raise InputError(
            f"{path}: expected format_version {VERSION}, found "
            f"{metadata.get('format_version')!r}. It is of another version of this project."
        )
    lacking = [key for key in _REQUIRED if key not in metadata]
    if lacking:
        raise InputError(f"{path}: its metadata lacks {', '.join(lacking)}. {_ADVICE}")
    numbers = {}
    for key in ("pixel_mean", "pixel_std"):
        try:
            numbers[key] = tuple(float(value) for value in metadata[key].split(","))
        except ValueError as error:
            raise InputError(
                f"{path}: expected numbers with commas in its metadata's {key}, found "
                f"{metadata[key]!r}. {_ADVICE}"
            ) from error
    return Preprocessing(
        metadata["channel_order"],
        numbers["pixel_mean"],
        numbers["pixel_std"],
        metadata["stride_in_1x1"] == "true",
    )
