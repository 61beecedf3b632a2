"""The visual backbone: a torchvision ResNet that returns its last feature map."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torchvision
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

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
BLOCKS = "blocks"


class VisualBackbone(nn.Module):
    """torchvision's ResNet (stride in the 3x3 convolution) without pooling and classifier.

    Parameters are named `cnn.conv1.weight`, `cnn.layer1.0.conv1.weight`, ... as in VirTex's
    checkpoints (arXiv 2006.06666, section 3.1).

    Args:
        zero_init_residual: whether `last_scales` start at 0.
        recompute: "blocks" keeps only the blocks' inputs for the backward pass, which computes the
            rest again, to the same numbers (Chen et al., arXiv 1604.06174); "" keeps all.
        compiled: whether training runs what torch.compile makes of it, for images of one shape.
            Evaluation, whose batches have many, does not.
        residual_scale: what `last_scales` start at if not at 0.
        norm: builds a norm of so many channels.
    """

    def __init__(
        self,
        name: str,
        zero_init_residual: bool = True,
        channels_last: bool = True,
        recompute: str = "",
        compiled: bool = False,
        residual_scale: float = 1.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        if name not in ARCHITECTURES:
            raise InputError(
                f"MODEL.VISUAL.NAME: {name!r} is not one of {', '.join(ARCHITECTURES)}."
                + nearest(name, ARCHITECTURES)
            )
        if recompute == "norms":
            raise InputError(
                'MODEL.VISUAL.RECOMPUTE "norms" is no more: it cost 8 % of the speed for 12 % of '
                f'the memory. Use "{BLOCKS}", which saves more, or ""; the numbers are the same.'
            )
        if recompute not in ("", BLOCKS):
            raise InputError(
                f'MODEL.VISUAL.RECOMPUTE: expected "{BLOCKS}" or "", found {recompute!r}.'
            )
        if recompute and compiled:
            raise InputError(
                f'MODEL.VISUAL.RECOMPUTE "{recompute}" with MODEL.VISUAL.COMPILE True: expected '
                "one of them; a compiler decides itself what it computes again."
            )
        if not (math.isfinite(residual_scale) and residual_scale > 0):
            raise InputError(
                f"MODEL.VISUAL.RESIDUAL_SCALE is {residual_scale}; expected a number above 0 (0 is "
                "MODEL.VISUAL.ZERO_INIT_RESIDUAL True)."
            )
        if zero_init_residual and residual_scale != 1:
            raise InputError(
                f"MODEL.VISUAL.RESIDUAL_SCALE {residual_scale:g} with ZERO_INIT_RESIDUAL True: the "
                "scales cannot start at both. Set MODEL.VISUAL.ZERO_INIT_RESIDUAL False."
            )
        self.name = name
        self.cnn = getattr(torchvision.models, name)(
            weights=None, zero_init_residual=zero_init_residual, norm_layer=norm
        )
        if residual_scale != 1:
            for scale in last_scales(self.cnn):
                nn.init.constant_(scale, residual_scale)
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
                return _recomputed_features(self.cnn, image)
            if self.compiled:
                return _compiled_features()(self.cnn, image)
        return features(self.cnn, image)


class CpuSyncBN(NaiveSyncBatchNorm):
    """detectron2's SyncBN for CPUs (torch's needs GPUs), which sums in float32 at least.

    Its running variance is that of the batch, not the estimate that torch's norms keep.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same, normalised by the images of all processes in training."""
        # squares of bfloat16 less the square of their mean would be noise
        wide = x.float() if x.dtype.itemsize < 4 else x
        return super().forward(wide).to(x.dtype)


def find_norm(name: str, device: str) -> Callable[[int], nn.Module]:
    """What builds the norms of MODEL.VISUAL.NORM on MODEL.DEVICE; all name their tensors alike."""
    if name not in ("BN", "SyncBN"):
        raise InputError(f"MODEL.VISUAL.NORM: expected BN or SyncBN, found {name!r}.")
    if name == "BN":
        return nn.BatchNorm2d
    return CpuSyncBN if device == "cpu" else nn.SyncBatchNorm


def last_scales(module: nn.Module) -> list[nn.Parameter]:
    """The scale of the last norm of each of torchvision's residual blocks in a module."""
    scales = []
    for block in module.modules():
        if isinstance(block, Bottleneck):
            scales.append(block.bn3.weight)
        elif isinstance(block, BasicBlock):
            scales.append(block.bn2.weight)
    return scales


def features(cnn: ResNet, image: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) float -> the last feature map, (N, C, H / 32, W / 32)."""
    return cnn.layer4(cnn.layer3(cnn.layer2(cnn.layer1(stem(cnn, image)))))


def stem(cnn: ResNet, image: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) float -> what the first stage takes, (N, 64, H / 4, W / 4)."""
    return cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(image))))


@functools.cache  # torch.compile imports its compiler, which takes seconds
def _compiled_features() -> Callable[[ResNet, torch.Tensor], torch.Tensor]:
    return torch.compile(features, dynamic=False)


def _recomputed_features(cnn: ResNet, image: torch.Tensor) -> torch.Tensor:
    """Compute `features`, keeping the inputs of the stem and of each block alone."""
    x = _checkpointed(functools.partial(stem, cnn), [cnn.bn1], image)
    for block in itertools.chain(cnn.layer1, cnn.layer2, cnn.layer3, cnn.layer4):
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        x = _checkpointed(block, norms, x)
    return x


def _checkpointed(
    function: Callable[[torch.Tensor], torch.Tensor], norms: list[_BatchNorm], x: torch.Tensor
) -> torch.Tensor:
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), _counted_already(norms)),
    )


@contextlib.contextmanager
def _counted_already(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let copies of the running statistics take this batch, which they have had."""
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


def require_compiler(device: torch.device) -> None:
    """Compile something small, so that what is missing is told before there is a run to lose."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    try:
        torch.compile(small, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of nearly any kind: its backends' and those of what they start
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"MODEL.VISUAL.COMPILE True: torch.compile does not work on this machine for "
            f"{device.type}: {reason} It needs a C++ compiler (g++, or "
            "what CXX names) on a CPU, Triton and a C compiler on a GPU; MODEL.VISUAL.COMPILE "
            "False needs neither."
        ) from error
