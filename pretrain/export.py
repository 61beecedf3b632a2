"""Training checkpoint -> backbone file: the one thing that pretraining hands to detection."""

import hashlib
from collections.abc import Mapping

import torch
import torchvision
from detectron2.config import CfgNode

from virtex_d2.engine.backbone_file import IMAGENET_RGB, write_backbone
from virtex_d2.engine.errors import InputError

_PREFIX = "visual.cnn."  # of the ResNet's tensors in an objective


def backbone_state_dict(model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An objective's tensors -> float32 CPU tensors by torchvision name, with running statistics.

    The batch counters (`num_batches_tracked`) stay behind: no detector uses them.
    """
    return {
        name.removeprefix(_PREFIX): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.items()
        if name.startswith(_PREFIX) and not name.endswith("num_batches_tracked")
    }


def export_backbone(
    model: Mapping[str, torch.Tensor], cfg: CfgNode, iteration: int, path: str
) -> None:
    """Write the backbone with all that its user has to know to feed it right; atomic.

    Args:
        model: an objective's state dict.
        cfg: the run's config; its sha256 is recorded.
        iteration: iterations trained.
        path: the file to write or replace, `.safetensors`.
    """
    tensors = backbone_state_dict(model)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{path} is not written: {len(broken)} tensors of the backbone hold NaN or Inf, the "
            f"first is {broken[0]}. The training has diverged: lower SOLVER.CNN_LR."
        )
    write_backbone(
        path,
        tensors,
        cfg.MODEL.VISUAL.NAME,
        IMAGENET_RGB,
        {
            "crop": str(cfg.DATA.IMAGE_SIZE),
            "source": f"pretrain {cfg.MODEL.OBJECTIVE}",
            "iteration": str(iteration),
            "config_sha256": hashlib.sha256(cfg.dump().encode()).hexdigest(),
            "torch_version": torch.__version__,
            "torchvision_version": torchvision.__version__,
        },
    )
