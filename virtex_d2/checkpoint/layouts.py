"""Whose checkpoint is this: what projects call the ResNet in their files, as a table.

A layout is recognised by the keys in the file, never by the file's name. To add one: an entry in
`LAYOUTS`, and a fixture in tests/checkpoint/layout_files.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from virtex_d2.checkpoint.naming import (
    CAFFE2,
    DETECTRON2,
    NAMINGS,
    SEQUENTIAL,
    SEQUENTIAL_STEM,
    TORCHVISION,
    TRANSFORMERS,
    Naming,
    unwrapped,
)

ORDER, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"


@dataclass(frozen=True)
class Preprocessing:
    """What was done to pixels before the network saw them.

    Attributes:
        channel_order: "RGB" or "BGR".
        mean, std: per channel in that order, on the scale 0 to 255.
        stride_in_1x1: whether a bottleneck halves the resolution in its first 1x1 convolution
            (MSRA's networks) or in the 3x3 one (torchvision's and all later ones).
    """

    channel_order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
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
        return cls(values[ORDER], tuple(values[MEAN]), tuple(values[STD]), values[STRIDE])

    def metadata(self) -> dict[str, str]:
        """The same as strings, for files."""
        return {
            "channel_order": self.channel_order,
            "pixel_mean": ",".join(map(str, self.mean)),
            "pixel_std": ",".join(map(str, self.std)),
            "stride_in_1x1": str(self.stride_in_1x1).lower(),
        }


# ImageNet's statistics as torchvision gives them (0.485, 0.456, 0.406; 0.229, 0.224, 0.225), x 255.
IMAGENET_RGB = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)
# MSRA's, as in detectron2's model zoo.
MSRA_BGR = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)


@dataclass(frozen=True)
class Copy:
    """One of the networks that a training checkpoint holds.

    Attributes:
        name: for `--copy` and VIRTEX.COPY.
        prefix: regular expression of what stands before the ResNet's names, without the wrappers
            of DDP, torch.compile and the like.
        container: regular expression of the path of dict keys to the state dict, joined by "/".
    """

    name: str
    prefix: str
    container: str = r"(?!.*ema).*"


@dataclass(frozen=True)
class Layout:
    """One project's files.

    Attributes:
        name: for `--layout` and VIRTEX.LAYOUT.
        projects: whose files look so.
        copies: the networks that may be in a file; the first is the one that is taken.
        naming: of the ResNet behind the prefix.
        markers: regular expressions of names; one must begin a name beside the ResNet's, or, where
            there are none here, the prefix alone is enough.
        preprocessing: what such networks are trained with, which is assumed where the file itself
            says nothing; None where there is no such custom.
        refusal: why this cannot be loaded, where it cannot.
        detector: whether the file is of a whole detector, which is loaded as detectron2 does.
    """

    name: str
    projects: str
    copies: tuple[Copy, ...]
    naming: Naming = TORCHVISION
    markers: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = IMAGENET_RGB
    refusal: str = ""
    detector: bool = False


_EMA = r"(.*/)?[^/]*ema[^/]*(/.*)?"

# What `convert` writes, and how the names of such files end.
SUFFIXES = {
    "backbone": (".safetensors",),
    "detectron2": (".pkl",),
    "torchvision": (".pth", ".safetensors"),
    "timm": (".pth", ".safetensors"),
}

LAYOUTS = (
    Layout(
        "virtex",
        "VirTex and VirTex-D2 pretraining checkpoints",
        (Copy("visual", r"visual\.cnn\."),),
    ),
    Layout(
        "torchvision",
        "torchvision, timm, VirTex's hub model, and the released ResNets of DINO, Barlow Twins, "
        "VICReg and others, which use its names",
        (Copy("model", ""), Copy("ema", "", _EMA)),
    ),
    Layout(
        "moco",
        "MoCo v1 and v2",
        (Copy("query", r"encoder_q\."), Copy("momentum", r"encoder_k\.")),
    ),
    Layout(
        "moco-v3",
        "MoCo v3",
        (Copy("base", r"base_encoder\."), Copy("momentum", r"momentum_encoder\.")),
    ),
    Layout(
        "swav",
        "SwAV and DeepCluster v2",
        (Copy("model", ""),),
        markers=(r"projection_head\.", r"prototypes\."),
    ),
    Layout(
        "dino",
        "DINO training checkpoints",
        (
            Copy("teacher", r"backbone\.", r"(.*/)?teacher(/.*)?"),
            Copy("student", r"backbone\.", r"(.*/)?student(/.*)?"),
        ),
    ),
    Layout(
        "backbone",
        "Barlow Twins, VICReg and VICRegL training, DenseCL, mmselfsup, SimCLR: `backbone.*`",
        (Copy("backbone", r"backbone\.", r"(?!(.*/)?(teacher|student)(/|$))(?!.*ema).*"),),
    ),
    Layout(
        "simsiam",
        "SimSiam",
        (Copy("encoder", r"encoder\."),),
        markers=(r"predictor\.", r"encoder\.fc\."),
    ),
    Layout(
        "pixpro",
        "PixPro",
        (Copy("encoder", r"encoder\."), Copy("momentum", r"encoder_k\.")),
        markers=(r"projector\.", r"projector_k\."),
    ),
    Layout(
        "byol",
        "BYOL",
        (
            Copy("online", r"online_(encoder|network)\.(net\.|encoder\.)?"),
            Copy("target", r"target_(encoder|network)\.(net\.|encoder\.)?"),
        ),
    ),
    Layout(
        "transformers",
        "ResNets of Hugging Face's transformers",
        (Copy("model", r"(resnet\.)?"),),
        naming=TRANSFORMERS,
    ),
    Layout(
        "sequential",
        "torchvision's ResNets in nn.Sequential, by number: lightly, fastai, many a script",
        (Copy("backbone", r"(backbone\.|0\.)?"), Copy("momentum", r"backbone_momentum\.")),
        naming=SEQUENTIAL,
    ),
    Layout(
        "sequential-stem",
        "the same with a stem that is a Sequential of its own",
        (Copy("backbone", r"(backbone\.)?"),),
        naming=SEQUENTIAL_STEM,
    ),
    Layout(
        "clip",
        "CLIP and its kin",
        (Copy("visual", r"(model\.)?visual\.(trunk\.)?"),),
        refusal="it is a CLIP image encoder: three stem convolutions, average pooling before the "
        "strided convolutions and an attention pool, another architecture than detectron2's ResNet",
    ),
    Layout(
        "detectron2",
        "detectron2's backbones alone",
        (Copy("backbone", r"(bottom_up\.)?"),),
        naming=DETECTRON2,
        preprocessing=None,
    ),
    Layout(
        "detectron2-detector",
        "whole detectors of detectron2",
        (
            Copy("detector", r"backbone\.(bottom_up\.)?"),
            Copy("ema", r"backbone\.(bottom_up\.)?", _EMA),
        ),
        naming=DETECTRON2,
        preprocessing=None,
        detector=True,
    ),
    Layout(
        "msra",
        "Caffe2 and MSRA ResNets of detectron2's and Detectron's model zoos",
        (Copy("model", ""),),
        naming=CAFFE2,
        preprocessing=MSRA_BGR,
    ),
)

# Wrappers that are left before names where a file has networks with and without one.
_WRAPPERS = r"(?:module\.|_orig_mod\.)*"
# The names by which a ResNet of each naming is found, whatever stands before them. Numbers are in
# many networks: there the stem must be beside them.
_ANCHORS = {
    "torchvision": ("layer1.0.conv1.weight",),
    "detectron2": ("res2.0.conv1.weight",),
    "caffe2": ("res2_0_branch2a_w",),
    "transformers": ("encoder.stages.0.layers.0.layer.0.convolution.weight",),
    "sequential": ("4.0.conv1.weight", "0.weight"),
    "sequential-stem": ("1.0.conv1.weight", "0.0.weight"),
}


@dataclass(frozen=True)
class Found:
    """A ResNet in a file, and what it may be.

    Attributes:
        container: path of dict keys to its state dict, joined by "/".
        prefix: before its names, without wrappers.
        naming: of its names.
        layouts: (layout, copy) that fit, the more specific layouts only.
    """

    container: str
    prefix: str
    naming: Naming
    layouts: tuple[tuple[Layout, Copy], ...]

    @property
    def place(self) -> str:
        """Where it is, for messages and --prefix: "state_dict/encoder_q."; "/" is all of a file."""
        return f"{self.container}/{self.prefix}" if self.container else self.prefix or "/"


def find_resnets(containers: dict[str, Sequence[str]]) -> list[Found]:
    """Every ResNet among the names of a file's state dicts, and the layouts that fit each.

    Args:
        containers: path -> the names in that state dict.
    """
    found = []
    for container, names in containers.items():
        present = set(unwrapped(names))
        for naming in NAMINGS:
            anchors = _ANCHORS[naming.name]
            prefixes = {n.removesuffix(anchors[0]) for n in present if n.endswith(anchors[0])}
            for prefix in sorted(prefixes):
                whole_words = not prefix or prefix.endswith(".")
                if not whole_words or not all(prefix + anchor in present for anchor in anchors):
                    continue
                fits = _fitting(container, prefix, naming, present)
                found.append(Found(container, prefix, naming, tuple(fits)))
    return found


def _fitting(
    container: str, prefix: str, naming: Naming, names: set[str]
) -> list[tuple[Layout, Copy]]:
    fits = [
        (layout, copy)
        for layout in LAYOUTS
        if layout.naming is naming
        for copy in layout.copies
        if re.fullmatch(_WRAPPERS + copy.prefix, prefix)
        and re.fullmatch(copy.container, container)
        and (not layout.markers or _marked(layout, names))
    ]
    # A layout that is told by more than its prefix is the more specific one.
    specific = [(layout, copy) for layout, copy in fits if layout.markers]
    return specific or fits


def _marked(layout: Layout, names: set[str]) -> bool:
    pattern = re.compile(_WRAPPERS + f"(?:{'|'.join(layout.markers)})")
    return any(pattern.match(name) for name in names)
