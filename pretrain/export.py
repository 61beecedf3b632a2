"""A method's weights: all tensors of a checkpoint loaded, or none; files of what is exported."""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torchvision
from detectron2.config import CfgNode
from torch import nn

from virtex_d2.engine.backbone_file import IMAGENET_RGB, backbone_metadata
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import write_safetensors
from virtex_d2.engine.safe_load import StoredCheckpoint, whole_content

logger = logging.getLogger(__name__)


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
    """The ResNet in a method's state dict by torchvision names, and how to feed it right."""
    metadata = backbone_metadata(cfg.MODEL.VISUAL.NAME, IMAGENET_RGB)
    metadata["crop"] = str(cfg.DATA.IMAGE_SIZE)
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


def differences(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps the tensors of one state dict from being those of another, by name."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model wants {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return problems


def load_weights(
    method: nn.Module,
    stored: StoredCheckpoint,
    identity: Mapping[str, str] = {},
    fresh: tuple[str, ...] = (),
) -> None:
    """Load every tensor of a pretraining checkpoint (ours or VirTex's).

    Args:
        method: a `pretrain.methods.method.Method`.
        stored: the file.
        identity: what the outputs mean: `Samples.identity`.
        fresh: prefixes of tensors that stay as they are, in the checkpoint or not.
    """
    path, checkpoint = stored.path, whole_content(stored)
    state = checkpoint.get("model", checkpoint)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = method.adapt(state, stored, fresh)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    whole = method.state_dict()
    own = {name: tensor for name, tensor in whole.items() if not name.startswith(fresh)}
    problems = differences(own, state)
    if problems:
        keys = "The method's keys must be those of the checkpoint."
        if hasattr(method, "visual"):
            keys = (
                "MODEL.VISUAL.NAME, MODEL.TEXTUAL.* and the tokenizer must be those of the "
                "checkpoint. VIRTEX.PREFIX visual.cnn. starts from its ResNet alone."
            )
        raise InputError(
            f"MODEL.WEIGHTS {path} is not of this model (MODEL.OBJECTIVE "
            f"{type(method).__name__}): {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Nothing was loaded. {keys}"
        )
    # another vocabulary of the same size fits every tensor, and means other words by each
    trained_with = checkpoint.get("run", {}).get("data", {})
    for what, here in identity.items():
        if trained_with.get(what, here) != here:
            raise InputError(
                f"{path}: was trained with another vocabulary ({what} was {trained_with[what]}, "
                f"here it is {here}), whose numbers mean other words. Nothing was loaded. Give "
                "what the model was trained with: tokenizer.model lies in the folder of its run."
            )
    method.load_state_dict({**whole, **state})
    logger.info("Loaded all %d tensors of %s.", len(own), path)
    if len(own) < len(whole):
        left = [name for name in whole if name not in own]
        logger.info("%d tensors start anew: %s", len(left), ", ".join(left))
