"""Training checkpoint -> backbone file: the one thing that pretraining hands to detection."""

import hashlib
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torchvision
from detectron2.config import CfgNode

import virtex_d2
from pretrain.colors import PIXEL_MEAN, PIXEL_STD
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import write_safetensors

FORMAT = "virtex_d2.backbone"
FORMAT_VERSION = "1"


class Exported(NamedTuple):
    """Content of a safetensors file: float32 tensors of the CPU, and what their user must know."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def tensors_of(model: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A state dict's tensors below a prefix, by their names without it.

    The batch counters (`num_batches_tracked`) stay behind: nobody uses them.
    """
    return {
        name.removeprefix(prefix): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }


def export_backbone(
    model: Mapping[str, torch.Tensor], cfg: CfgNode, prefix: str = "visual.cnn."
) -> Exported:
    """The ResNet of a method by torchvision names, with all that its user needs to feed it right.

    Args:
        model: a method's state dict.
        cfg: of the run.
        prefix: of the ResNet's tensors.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": cfg.MODEL.VISUAL.NAME,
        "channel_order": "RGB",
        "pixel_mean": ",".join(map(str, PIXEL_MEAN)),
        "pixel_std": ",".join(map(str, PIXEL_STD)),
        "crop": str(cfg.DATA.IMAGE_SIZE),
        "stride_in_1x1": "false",
    }
    return Exported(tensors_of(model, prefix), metadata)


def write_exports(
    exports: Mapping[str, Exported], cfg: CfgNode, iteration: int, suffix: str = ""
) -> None:
    """Write OUTPUT_DIR/<name><suffix>.safetensors of each, atomically, with where it is from.

    Args:
        exports: by name.
        cfg: the run's config; its sha256 is recorded.
        iteration: iterations trained.
        suffix: "_best" of the best model.
    """
    origin = {
        "source": f"pretrain {cfg.MODEL.OBJECTIVE}",
        "iteration": str(iteration),
        "config_sha256": hashlib.sha256(cfg.dump().encode()).hexdigest(),
        "virtex_d2_version": virtex_d2.__version__,
        "torch_version": torch.__version__,
        "torchvision_version": torchvision.__version__,
    }
    for name, (tensors, metadata) in exports.items():
        path = os.path.join(cfg.OUTPUT_DIR, f"{name}{suffix}.safetensors")
        broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise InputError(
                f"{path} is not written: {len(broken)} of its tensors hold NaN or Inf, the first "
                f"is {broken[0]}. The training has diverged: lower SOLVER.CNN_LR."
            )
        write_safetensors(path, tensors, {**metadata, **origin})
