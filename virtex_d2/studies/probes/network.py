"""The network under test: a detector's ResNet, loaded as strictly, pooled, without heads."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import nn
from torch.nn import functional as F

from virtex_d2.checkpoint.transfer import apply_preprocessing, load_backbone, open_weights
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

RANDOM = "random"


class PooledResNet(nn.Module):
    """detectron2's ResNet up to res5, averaged over all positions.

    Args:
        cfg: of `get_probe_cfg`, completed by `complete_config`.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone: ResNet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        self.feature_size: int = self.backbone.output_shape()["res5"].channels
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W), channels in INPUT.FORMAT's order -> (N, feature_size)."""
        return self.backbone((images - self.pixel_mean) / self.pixel_std)["res5"].mean((2, 3))


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
            "MODEL.WEIGHTS is empty; expected a checkpoint with a ResNet, or random for one of "
            "random weights."
        )
    if cfg.MODEL.WEIGHTS == RANDOM:
        return []
    source, virtex = open_weights(cfg), cfg.VIRTEX
    backbone = source.backbone(virtex.LAYOUT, virtex.COPY, virtex.PREFIX)
    for key, value in backbone.architecture.config().items():
        cfg.MODEL.RESNETS[key.rpartition(".")[2]] = value
    return apply_preprocessing(cfg, source)


def build_network(cfg: CfgNode) -> tuple[PooledResNet, dict[str, Any]]:
    """The network on MODEL.DEVICE, in evaluation mode, and what it is, for results.json."""
    torch.manual_seed(cfg.SEED)
    try:
        network = PooledResNet(cfg)
    except (AssertionError, KeyError) as error:  # detectron2's words for a size that it lacks
        raise InputError(f"MODEL.RESNETS: detectron2 cannot build this ResNet: {error}.") from error
    about: dict[str, Any] = {"weights": cfg.MODEL.WEIGHTS}
    if cfg.MODEL.WEIGHTS == RANDOM:
        if cfg.MODEL.ZERO_INIT_RESIDUAL:
            _zero_init_residual(network.backbone)
        logger.info("Backbone: a ResNet-%d of random weights", cfg.MODEL.RESNETS.DEPTH)
        about |= {"seed": cfg.SEED, "zero_init_residual": cfg.MODEL.ZERO_INIT_RESIDUAL}
    else:
        report = load_backbone(network, open_weights(cfg), cfg)
        about |= {
            "sha256": report.sha256,
            "layout": report.layout,
            "copy": report.copy,
            "architecture": report.architecture,
            "notes": list(report.notes),
        }
    return network.to(cfg.MODEL.DEVICE).eval(), {**about, "tensors_sha256": fingerprint(network)}


def fingerprint(module: nn.Module) -> str:
    """The SHA-256 of every parameter and buffer: name, type, shape and bytes.

    A third of a second for a ResNet-50. Running statistics are buffers, so that a network that was
    merely run in training mode has another one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_untouched(network: nn.Module, before: str) -> None:
    """Fail where a network that was to be frozen has changed.

    Raises:
        RuntimeError: its `fingerprint` is not `before`; what was computed with it is worth nothing.
    """
    if fingerprint(network) != before:
        raise RuntimeError(
            "the frozen backbone has changed: weights or norm statistics differ from those that "
            "were loaded. This is a mistake in the program; the result is withheld."
        )


def _zero_init_residual(backbone: ResNet) -> None:
    for stage in backbone.stages:
        for block in stage:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            nn.init.zeros_(last.norm.weight)
