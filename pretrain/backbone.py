"""The visual backbone: a torchvision ResNet that returns its last feature map."""

import torch
import torchvision
from torch import nn

from virtex_d2.runtime.errors import InputError, nearest

from .recomputation import BLOCKS, NORMS, run_resnet

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


class VisualBackbone(nn.Module):
    """torchvision's ResNet (stride in the 3x3 convolution) without pooling and classifier.

    Parameters are named `cnn.conv1.weight`, `cnn.layer1.0.conv1.weight`, ... as in VirTex's
    checkpoints (arXiv 2006.06666, section 3.1).

    Args:
        recompute: what the backward pass computes again, as `pretrain.recomputation` has it:
            "norms" or "blocks", or "" for nothing.

    Raises:
        InputError: the architecture's name is not in `ARCHITECTURES`, or `recompute` is unknown.
    """

    def __init__(
        self,
        name: str,
        zero_init_residual: bool = True,
        channels_last: bool = True,
        recompute: str = "",
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
        self.name = name
        self.cnn = getattr(torchvision.models, name)(
            weights=None, zero_init_residual=zero_init_residual
        )
        self.feature_size: int = self.cnn.fc.in_features
        self.cnn.fc = nn.Identity()  # leaves no key in the state dict
        self.channels_last = channels_last
        self.recompute = recompute
        if channels_last:
            self.cnn.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised float -> (N, feature_size, H / 32, W / 32)."""
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        cnn = self.cnn
        if self.recompute and self.training and torch.is_grad_enabled():
            return run_resnet(cnn, image, self.recompute)
        x = cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(image))))
        return cnn.layer4(cnn.layer3(cnn.layer2(cnn.layer1(x))))
