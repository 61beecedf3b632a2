"""What a pretraining starts from: a checkpoint of its own kind, or a ResNet of anybody's."""

import logging
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import nn

from pretrain.backbone import ARCHITECTURES, VisualBackbone, stem
from pretrain.export import load_weights
from pretrain.transforms import normalize
from virtex_d2.checkpoint.probe import TOLERANCE, compare
from virtex_d2.checkpoint.resnet import doubt_of_scale, recognise_resnet
from virtex_d2.checkpoint.source import Backbone, Source, local_path
from virtex_d2.checkpoint.statements import same
from virtex_d2.engine.backbone_file import IMAGENET_RGB
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)

MODES = ("check", "config")  # of VIRTEX.PREPROCESSING; pretraining's own is always the same
_PLACE = "visual.cnn."  # of a method's ResNet
_VOUCH = (
    "Pretraining feeds RGB less ImageNet's mean over its deviation, with the stride in the 3x3 "
    "convolutions. Where the network was trained so, vouch for it with VIRTEX.PREPROCESSING config."
)


def load_start(
    method: nn.Module, cfg: CfgNode, identity: Mapping[str, str], fresh: tuple[str, ...] = ()
) -> None:
    """Start from MODEL.WEIGHTS: every tensor of the model, or every tensor of its ResNet.

    A file whose ResNet lies in `visual.cnn.` is a pretraining's, and is loaded whole; of any other,
    or where VIRTEX.LAYOUT, COPY or PREFIX says which, the ResNet is taken.

    Args:
        method: the model.
        cfg: the run's.
        identity, fresh: of `load_weights`.
    """
    virtex = cfg.VIRTEX
    if virtex.PREPROCESSING not in MODES:
        raise InputError(
            f"VIRTEX.PREPROCESSING is {virtex.PREPROCESSING!r}; for pretraining expected one of "
            f"{', '.join(MODES)}. {_VOUCH}"
        )
    source = Source(local_path(cfg.MODEL.WEIGHTS))
    chosen = bool(virtex.LAYOUT or virtex.COPY or virtex.PREFIX)
    visual = getattr(method, "visual", None)
    if not isinstance(visual, VisualBackbone):
        if chosen:
            raise InputError(
                f"VIRTEX.LAYOUT, COPY and PREFIX choose a ResNet in {source.path}, and "
                f"MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE} has none (`visual`). Leave them out."
            )
    elif chosen or not any(found.prefix == _PLACE for found in source.resnets):
        load_resnet(visual, source, cfg)
        others = [name for name in method.state_dict() if not name.startswith(_PLACE)]
        logger.info("%d other tensors of the model start anew.", len(others))
        return
    load_weights(method, source.stored, identity, fresh)


def load_resnet(visual: VisualBackbone, source: Source, cfg: CfgNode) -> None:
    """Set every tensor of the ResNet from a file of any layout, running statistics included.

    Then its stages' outputs are compared with the source network's (`checkpoint.probe`).

    Args:
        visual: of MODEL.VISUAL.
        source: its ResNet must be of MODEL.VISUAL.NAME, and trained with pretraining's pixels.
        cfg: its VIRTEX group says which of the file's networks.
    """
    virtex = cfg.VIRTEX
    vouched = virtex.PREPROCESSING == "config"
    backbone = source.backbone(virtex.LAYOUT, virtex.COPY, virtex.PREFIX)
    state = visual.cnn.state_dict()
    _check_architecture(backbone, visual.name, state)
    if not vouched:
        _check_pixels(backbone)
    if backbone.folded:
        raise InputError(
            f"{backbone.path}: the running statistics of its norms are folded into their weights "
            "(mean 0, variance 1). Pretraining normalises by a batch's own statistics, which would "
            "make another network of it; nothing was loaded. Take a file with statistics."
        )
    with torch.no_grad():
        for name, tensor in backbone.tensors.items():
            state[name].copy_(tensor)
    result = compare(visual, lambda rgb: _stages(visual, rgb), backbone, IMAGENET_RGB)
    scale = backbone.last_norm_scale
    assumed = ", ".join(backbone.assumed)
    pixels = f"as pretraining's; the file does not say, assumed: {assumed}" if assumed else ""
    rows = {
        "source": f"{backbone.path} (sha256 {backbone.sha256[:12]})",
        "layout": f"{backbone.layout}, {backbone.copy}: {backbone.architecture.name}",
        "set": f"{len(backbone.tensors)} of {len(backbone.tensors)} tensors, 0 missing",
        "dropped": f"{len(backbone.dropped)} {', '.join(backbone.dropped[:3])}".strip(),
        "pixels": "vouched for: VIRTEX.PREPROCESSING config"
        if vouched
        else pixels or "as pretraining's, as the file says",
        "probe": result.summary(),
        "scales": f"median {scale:.3g} of the residual blocks' last norms",
    }
    table = "\n".join(f"  {key:8} {value}" for key, value in rows.items())
    logger.info("ResNet loaded:\n%s", table)
    for note in backbone.notes:
        logger.info("%s: %s", backbone.path, note)
    if doubt := doubt_of_scale(scale):
        logger.warning("%s: %s", backbone.path, doubt)
    if not result.passed:
        raise InputError(
            f"{backbone.path}: all {len(backbone.tensors)} tensors were set, but the model does "
            f"not compute what the file's network computes (relative error by stage: "
            f"{result.summary()}; at most {TOLERANCE:g}). Likely cause: {result.cause}."
        )


def _stages(visual: VisualBackbone, rgb: torch.Tensor) -> dict[str, torch.Tensor]:
    """(3, H, W), 0 to 255 -> what leaves each stage, through pretraining's own preprocessing."""
    cnn = visual.cnn
    x = normalize(rgb[None].to(torch.uint8)).to(cnn.conv1.weight.dtype)
    x = stem(cnn, x)
    stages = {"stem": x}
    for number in range(1, 5):
        x = stages[f"res{number + 1}"] = getattr(cnn, f"layer{number}")(x)
    return stages


def _check_architecture(backbone: Backbone, name: str, state: Mapping[str, torch.Tensor]) -> None:
    found = backbone.architecture
    if found == recognise_resnet(state, f"MODEL.VISUAL.NAME {name}"):
        return
    advice = f"Set MODEL.VISUAL.NAME {found.name}."
    if found.name not in ARCHITECTURES:
        advice = f"MODEL.VISUAL.NAME can be {', '.join(ARCHITECTURES)}."
    raise InputError(
        f"{backbone.path}: holds a {found.name}, and MODEL.VISUAL.NAME is {name}; nothing was "
        f"loaded. {advice}"
    )


def _check_pixels(backbone: Backbone) -> None:
    path = backbone.path
    if backbone.doubts:
        raise InputError(f"{path}: {backbone.doubts[0]}. Nothing was loaded. {_VOUCH}")
    if backbone.preprocessing is None:
        raise InputError(
            f"{path}: files of layout {backbone.layout} do not say what their network was trained "
            f"with. Nothing was loaded. {_VOUCH}"
        )
    here, there = IMAGENET_RGB.config(), backbone.preprocessing.config()
    other = [
        f"{key} {there[key]}{' (assumed)' if key in backbone.assumed else ''}, here {here[key]}"
        for key in here
        if not same(here[key], there[key])
    ]
    if other:
        raise InputError(
            f"{path} (layout {backbone.layout}): its network was trained with other pixels than "
            f"pretraining's, or has its stride elsewhere; nothing was loaded: {'; '.join(other)}. "
            "Take a network of torchvision's preprocessing; there is no setting for another."
        )
