"""The visual backbone: a torchvision ResNet that returns its last feature map."""

import functools
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torchvision.models import ResNet

from pretrain.recomputation import BLOCKS, NORMS, run_resnet
from virtex_d2.engine.errors import InputError, nearest

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def features(cnn: ResNet, image: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) float -> the last feature map, (N, C, H / 32, W / 32)."""
    x = cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(image))))
    return cnn.layer4(cnn.layer3(cnn.layer2(cnn.layer1(x))))


@functools.cache  # torch.compile imports its compiler, which takes seconds
def _compiled_features() -> Callable[[ResNet, torch.Tensor], torch.Tensor]:
    return torch.compile(features, dynamic=False)


class VisualBackbone(nn.Module):
    """torchvision's ResNet (stride in the 3x3 convolution) without pooling and classifier.

    Parameters are named `cnn.conv1.weight`, `cnn.layer1.0.conv1.weight`, ... as in VirTex's
    checkpoints (arXiv 2006.06666, section 3.1).

    Args:
        recompute: what the backward pass computes again, as `pretrain.recomputation` has it:
            "norms" or "blocks", or "" for nothing.
        compiled: whether training runs what torch.compile makes of it, for images of one shape.
            Evaluation, whose batches have many, does not.
    """

    def __init__(
        self,
        name: str,
        zero_init_residual: bool = True,
        channels_last: bool = True,
        recompute: str = "",
        compiled: bool = False,
    ):
        super().__init__()
        if name not in ARCHITECTURES:
            raise InputError(
                f"MODEL.VISUAL.NAME: {name!r} is not one of {', '.join(ARCHITECTURES)}."
                + nearest(name, ARCHITECTURES)
            )
        if recompute not in ("", NORMS, BLOCKS):
            raise InputError(
                f'MODEL.VISUAL.RECOMPUTE: expected "{NORMS}", "{BLOCKS}" or "", found '
                f"{recompute!r}."
            )
        if recompute and compiled:
            raise InputError(
                f'MODEL.VISUAL.RECOMPUTE "{recompute}" with MODEL.VISUAL.COMPILE True: expected '
                "one of them; a compiler decides itself what it computes again."
            )
        self.name = name
        self.cnn = getattr(torchvision.models, name)(
            weights=None, zero_init_residual=zero_init_residual
        )
        self.feature_size: int = self.cnn.fc.in_features
        self.cnn.fc = nn.Identity()  # leaves no key in the state dict
        self.channels_last = channels_last
        self.recompute = recompute
        self.compiled = compiled
        if channels_last:
            self.cnn.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised float -> (N, feature_size, H / 32, W / 32)."""
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        if self.training and torch.is_grad_enabled():
            if self.recompute:
                return run_resnet(self.cnn, image, self.recompute)
            if self.compiled:
                return _compiled_features()(self.cnn, image)
        return features(self.cnn, image)
