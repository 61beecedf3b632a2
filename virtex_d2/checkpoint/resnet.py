"""Which ResNet a set of tensors is, and what each tensor's shape must then be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from virtex_d2.checkpoint.layouts import NORM
from virtex_d2.engine.errors import InputError

# Depth by (blocks of the four stages, whether they are bottlenecks). He et al., arXiv 1512.03385,
# table 1.
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
BLOCKS = {depth: blocks for (blocks, _), depth in DEPTHS.items()}

# Of a residual block's last norm. Pretrainings that began at 0, and were worse than none, had ended
# at 0.01 to 0.06 (docs/transfer.md).
LOW_SCALE = 0.1


@dataclass(frozen=True)
class ResNet:
    """What MODEL.RESNETS can say of a ResNet."""

    depth: int  # 18, 34, 50, 101 or 152
    stem_channels: int = 64  # of the 7x7 convolution
    res2_channels: int = 256  # that the first stage gives out; each later one gives twice as many
    groups: int = 1  # of a bottleneck's 3x3 convolutions
    group_width: int = 64  # channels of each group in the first stage

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def name(self) -> str:
        """As torchvision calls it: resnet50, wide_resnet50_2, resnext50_32x4d; others with widths.

        >>> ResNet(50, groups=32, group_width=4).name
        'resnext50_32x4d'
        """
        expected = (64, 256, 64) if self.bottleneck else (64, 64, 64)
        width = self.groups * self.group_width
        if (self.stem_channels, self.res2_channels) != expected[:2]:
            return f"resnet{self.depth} with {self.stem_channels} to {self.res2_channels} channels"
        if self.groups > 1:
            return f"resnext{self.depth}_{self.groups}x{self.group_width}d"
        if width != expected[2]:
            return f"wide_resnet{self.depth}_{width / expected[2]:g}"
        return f"resnet{self.depth}"

    def config(self) -> dict[str, int]:
        """The config keys that build it in detectron2."""
        values = {
            "DEPTH": self.depth,
            "STEM_OUT_CHANNELS": self.stem_channels,
            "RES2_OUT_CHANNELS": self.res2_channels,
        }
        if self.bottleneck:
            values |= {"NUM_GROUPS": self.groups, "WIDTH_PER_GROUP": self.group_width}
        return {f"MODEL.RESNETS.{key}": value for key, value in values.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its torchvision name: 265 of them for a ResNet-50."""
        shapes: dict[str, tuple[int, ...]] = {}

        def add(convolution: str, norm: str, out: int, into: int, kernel: int) -> None:
            shapes[f"{convolution}.weight"] = (out, into, kernel, kernel)
            shapes.update({f"{norm}.{parameter}": (out,) for parameter in NORM})

        add("conv1", "bn1", self.stem_channels, 3, 7)
        into = self.stem_channels
        for stage, count in enumerate(BLOCKS[self.depth]):
            out = self.res2_channels << stage
            width = (self.groups * self.group_width) << stage if self.bottleneck else out
            for block in range(count):
                name = f"layer{stage + 1}.{block}"
                if self.bottleneck:
                    add(f"{name}.conv1", f"{name}.bn1", width, into, 1)
                    add(f"{name}.conv2", f"{name}.bn2", width, width // self.groups, 3)
                    add(f"{name}.conv3", f"{name}.bn3", out, width, 1)
                else:
                    add(f"{name}.conv1", f"{name}.bn1", width, into, 3)
                    add(f"{name}.conv2", f"{name}.bn2", out, width, 3)
                # The first block of a stage halves the resolution or changes the width.
                if block == 0 and (stage > 0 or into != out):
                    add(f"{name}.downsample.0", f"{name}.downsample.1", out, into, 1)
                into = out
        return shapes

    def last_scales(self) -> tuple[str, ...]:
        """Torchvision's names of the scale of each residual block's last norm: of its output."""
        last = 3 if self.bottleneck else 2
        return tuple(
            f"layer{stage}.{block}.bn{last}.weight"
            for stage, count in enumerate(BLOCKS[self.depth], start=1)
            for block in range(count)
        )


def median_scale(architecture: ResNet, tensors: Mapping[str, torch.Tensor]) -> float:
    """The median magnitude of `ResNet.last_scales`, over all channels of all blocks.

    Args:
        architecture: of the tensors.
        tensors: by torchvision name.
    """
    scales = [tensors[name].detach().cpu().flatten() for name in architecture.last_scales()]
    return float(torch.cat(scales).abs().median())


def doubt_of_scale(scale: float) -> str:
    """What a median of last scales means to a network that starts from it; "" where nothing."""
    if scale >= LOW_SCALE:
        return ""
    return (
        f"the last norms of its residual blocks have scales of {scale:.3g} (median; below "
        f"{LOW_SCALE:g} is low): the blocks add next to nothing, so that a detector starts from "
        "little more than the shortcuts. A short pretraining that began with scales of 0 leaves it "
        "so, and may be worse than none: compare with a random start, or pretrain longer, with "
        "MODEL.VISUAL.RESIDUAL_SCALE or SOLVER.SCALE_LR_FACTOR"
    )


def recognise_resnet(tensors: Mapping[str, torch.Tensor], source: str) -> ResNet:
    """The ResNet that tensors in torchvision's names are.

    Args:
        tensors: by name; some may be missing as long as the first block is there.
        source: the file, for messages.
    """
    found: list[list[int]] = []
    for stage in range(1, 5):
        pattern = re.compile(rf"layer{stage}\.(\d+)\.")
        blocks = {int(match[1]) for name in tensors if (match := pattern.match(name))}
        found.append(sorted(blocks))
    for stage, blocks in enumerate(found, start=1):
        gaps = sorted(set(range(max(blocks, default=0) + 1)) - set(blocks))
        if gaps:
            raise InputError(
                f"{source}: layer{stage} has no block {gaps[0]} (res{stage + 1} in detectron2's "
                f"names; found blocks {_listed(blocks)}). The file is not whole: nothing loaded."
            )
    counts = tuple(map(len, found))
    bottleneck = "layer1.0.conv3.weight" in tensors
    if (counts, bottleneck) not in DEPTHS:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        known = "; ".join(
            f"{'-'.join(map(str, blocks))} {'bottlenecks' if deep else 'basic blocks'}"
            for blocks, deep in DEPTHS
        )
        raise InputError(
            f"{source}: stages of {'-'.join(map(str, counts))} {kind}; detectron2's ResNet can be "
            f"{known}. Nothing was loaded."
        )
    last = f"layer1.0.conv{3 if bottleneck else 2}.weight"
    needed = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", last)
    for name in needed:
        if name not in tensors or tensors[name].dim() != 4:
            shape = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise InputError(
                f"{source}: expected a convolution's weight (4 dimensions) as {name}, found {shape}"
            )
    stem, first, second, last_shape = (tuple(tensors[name].shape) for name in needed)
    groups = 1
    if bottleneck and 0 < second[1] < first[0]:
        groups = first[0] // second[1]
    return ResNet(
        depth=DEPTHS[counts, bottleneck],
        stem_channels=stem[0],
        res2_channels=last_shape[0],
        groups=groups,
        group_width=first[0] // groups,
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
