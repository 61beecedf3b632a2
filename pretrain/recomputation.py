"""Residual networks that keep less for the backward pass and compute it again.

NORMS: what a convolution keeps for its weights' gradient is, within a block, the output of batch
norm and ReLU: cheap to compute again from batch norm's own input, which is kept anyway. In-place
activated batch norm (Rota Bulo et al., arXiv 1712.02616) keeps the other of the two, for which the
activation must be invertible; ReLU is not.

BLOCKS: only the blocks' inputs are kept (Chen et al., arXiv 1604.06174), for one more forward pass.

Either gives the same numbers to the bit; `tools/benchmark.py pretrain --recompute WHAT` measures
them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

NORMS, BLOCKS = "norms", "blocks"


def run_resnet(cnn: ResNet, image: torch.Tensor, what: str) -> torch.Tensor:
    """The last feature map in training.

    Args:
        cnn: torchvision's.
        image: (N, 3, H, W) float.
        what: is computed again: `NORMS` or `BLOCKS`.

    Returns:
        (N, C, H / 32, W / 32).
    """

    def stem(x: torch.Tensor, again: bool) -> torch.Tensor:
        return cnn.maxpool(F.relu(_normed(cnn.bn1, cnn.conv1(x), again), inplace=True))

    x = _computed_again(stem, image) if what == BLOCKS else stem(image, again=False)
    for stage in (cnn.layer1, cnn.layer2, cnn.layer3, cnn.layer4):
        for block in stage:
            x = _run_block(block, x, what)
    return x


def _run_block(block: BasicBlock | Bottleneck, x: torch.Tensor, what: str) -> torch.Tensor:
    if what == BLOCKS:
        return _computed_again(lambda x, again: _block(block, x, again), x)
    out = _norm_relu_conv(block.bn1, block.conv2, block.conv1(x))
    if isinstance(block, Bottleneck):
        out = _norm_relu_conv(block.bn2, block.conv3, out)
    return _with_shortcut(block, x, out, again=False)


def _block(block: BasicBlock | Bottleneck, x: torch.Tensor, again: bool) -> torch.Tensor:
    out = F.relu(_normed(block.bn1, block.conv1(x), again), inplace=True)
    out = block.conv2(out)
    if isinstance(block, Bottleneck):
        out = block.conv3(F.relu(_normed(block.bn2, out, again), inplace=True))
    return _with_shortcut(block, x, out, again)


def _with_shortcut(
    block: BasicBlock | Bottleneck, x: torch.Tensor, out: torch.Tensor, again: bool
) -> torch.Tensor:
    """The end of a block.

    Args:
        x: what the block was given.
        out: of its last convolution.
    """
    out = _normed(block.bn3 if isinstance(block, Bottleneck) else block.bn2, out, again)
    if block.downsample is not None:
        conv, norm = block.downsample
        x = _normed(norm, conv(x), again)
    out += x
    return F.relu(out, inplace=True)


def _norm_relu_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    # the second time it ends before the convolution: by then all is there that was kept of it
    return _computed_again(lambda x, again: conv(F.relu(_normed(norm, x, again), inplace=True)), x)


def _normed(norm: nn.BatchNorm2d, x: torch.Tensor, again: bool) -> torch.Tensor:
    if not again:
        return norm(x)
    # the same numbers; the running statistics have had this batch, so copies take it
    running = norm.running_mean.clone(), norm.running_var.clone()
    return F.batch_norm(x, *running, norm.weight, norm.bias, True, 0.0, norm.eps)


def _computed_again(
    function: Callable[[torch.Tensor, bool], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`function(x, again)`, of which nothing but `x` is kept; it learns whether it ran before."""
    again = False

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal again
        result = function(x, again)
        again = True
        return result

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
