"""ResNets of one block a stage and a quarter of the width, where any ResNet would do as well.

For runs whose weights only need to be another run's, bit for bit: with the whole ResNet-18 such a
test mostly writes and reads its eleven million parameters.
"""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

NARROWER = 4


class ThinResNet(ResNet):
    """torchvision's ResNet with its names, strides and norms: feature maps have 128 channels."""

    def __init__(self, **options):
        options.pop("weights", None)
        super().__init__(BasicBlock, [1, 1, 1, 1], **options)
        self.fc = nn.Linear(self.fc.in_features // NARROWER, self.fc.out_features)

    def _make_layer(self, block, planes, *more, **options):
        return super()._make_layer(block, planes // NARROWER, *more, **options)


def install(replace=setattr) -> None:
    """Put `ThinResNet` in the place of ResNet-18, for this process or as monkeypatch.setattr does.

    The config and what a run leaves say resnet18 all the same.
    """
    replace(torchvision.models, "resnet18", ThinResNet)
