"""Residual blocks that keep less for the backward pass.

What a convolution keeps for its weights' gradient is, within a block, the output of batch norm and
ReLU: cheap to compute again from batch norm's own input, which is kept anyway. In-place activated
batch norm (Rota Bulo et al., arXiv 1712.02616) keeps the other of the two, for which the activation
must be invertible; ReLU is not. `tools/benchmark.py pretrain --recompute` measures what it saves.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck


def run_block(block: BasicBlock | Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """What `block(x)` returns in training, and keeps less of."""
    out = _norm_relu_conv(block.bn1, block.conv2, block.conv1(x))
    if isinstance(block, Bottleneck):
        out = _norm_relu_conv(block.bn2, block.conv3, out)
        out = block.bn3(out)
    else:
        out = block.bn2(out)
    out += x if block.downsample is None else block.downsample(x)
    return F.relu(out, inplace=True)


def _norm_relu_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    first = True

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal first
        if first:
            first = False
            normed = norm(x)
        else:  # the same numbers; the running statistics have had this batch, so copies take it
            running = norm.running_mean.clone(), norm.running_var.clone()
            normed = F.batch_norm(x, *running, norm.weight, norm.bias, True, 0.0, norm.eps)
        # the second time it ends before the convolution: by then all is there that was kept of it
        return conv(F.relu(normed, inplace=True))

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
