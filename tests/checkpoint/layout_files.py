"""Checkpoints as projects write them: the real key names around a thin ResNet."""

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from virtex_d2.checkpoint.layouts import (
    CAFFE2,
    DETECTRON2,
    SEQUENTIAL,
    SEQUENTIAL_STEM,
    TORCHVISION,
    TRANSFORMERS,
    translate,
)
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.checkpoint.transfer import backbone_names

THIN = ResNet(50, stem_channels=8, res2_channels=16, group_width=4)
FULL = ResNet(50)
Tensors = Mapping[str, torch.Tensor]


def random_resnet(architecture: ResNet = THIN, seed: int = 0, counters: bool = True) -> dict:
    """A ResNet's tensors in torchvision's names, statistics random too: one left behind shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in architecture.shapes().items():
        if len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            tensors[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        else:
            # Small gains in front of the sums, as in a trained network, or depth blows them up.
            low = 0.2 if name.endswith(("bn3.weight", "bn2.weight")) else 0.5
            tensors[name] = torch.rand(shape, generator=generator) + low
        if counters and name.endswith("running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return tensors


def backbone_in(detector: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The ResNet of a detector in torchvision's names."""
    state = detector.state_dict()
    names = backbone_names(state).items()
    return {translate(name, DETECTRON2, TORCHVISION): state[full] for name, full in names}


def with_prefix(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def head(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(3, 2) for name in names}


def _translated(tensors: Tensors) -> list[str]:
    return [name for name in tensors if translate(name, TORCHVISION, SEQUENTIAL)]


def in_sequence(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    names = _translated(tensors)
    return {prefix + translate(name, TORCHVISION, SEQUENTIAL): tensors[name] for name in names}


def in_detectron2(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    names = {name: translate(name, TORCHVISION, DETECTRON2) for name in tensors}
    return {prefix + new: tensors[name] for name, new in names.items() if new}


def _optimizer(tensors: Tensors) -> dict[str, Any]:
    state = {0: {"momentum_buffer": torch.zeros(3)}}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}


def virtex(r: Tensors, other: Tensors) -> Any:
    names = ("textual.embedding.words.weight", "visual.projection.weight")
    state = {**with_prefix(r, "visual.cnn."), **head(*names)}
    return {"model": state, "optimizer": _optimizer(r), "iteration": 3}


def virtex_ddp(r: Tensors, other: Tensors) -> Any:
    return {"model": with_prefix(virtex(r, other)["model"], "module."), "iteration": 3}


def torchvision(r: Tensors, other: Tensors) -> Any:
    return {**r, **head("fc.weight", "fc.bias")}


def timm_ema(r: Tensors, other: Tensors) -> Any:
    state = {**r, **head("fc.weight")}
    return {"arch": "resnet50", "state_dict": state, "state_dict_ema": dict(other), "epoch": 2}


def moco(r: Tensors, other: Tensors) -> Any:
    state = {
        **with_prefix(r, "module.encoder_q."),
        **with_prefix(other, "module.encoder_k."),
        **head("module.encoder_q.fc.0.weight", "module.queue", "module.queue_ptr"),
    }
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": _optimizer(r)}


def moco_v3(r: Tensors, other: Tensors) -> Any:
    state = {
        **with_prefix(r, "module.base_encoder."),
        **with_prefix(other, "module.momentum_encoder."),
        **head("module.predictor.0.weight", "module.base_encoder.fc.0.weight"),
    }
    return {"epoch": 1, "state_dict": state}


def swav(r: Tensors, other: Tensors) -> Any:
    return with_prefix({**r, **head("projection_head.0.weight", "prototypes.weight")}, "module.")


def dino(r: Tensors, other: Tensors) -> Any:
    return {
        "student": {**with_prefix(other, "module.backbone."), **head("module.head.mlp.0.weight")},
        "teacher": {**with_prefix(r, "backbone."), **head("head.mlp.0.weight")},
        "optimizer": _optimizer(r),
        "args": argparse.Namespace(arch=f"resnet{50 if 'layer1.0.conv3.weight' in r else 18}"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def barlow_twins(r: Tensors, other: Tensors) -> Any:
    names = ("module.projector.0.weight", "module.bn.running_mean")
    return {"epoch": 1, "model": {**with_prefix(r, "module.backbone."), **head(*names)}}


def vicregl(r: Tensors, other: Tensors) -> Any:
    names = ("module.projector.0.weight", "module.maps_projector.0.weight")
    return {"epoch": 1, "model": {**with_prefix(r, "module.backbone."), **head(*names)}}


def simsiam(r: Tensors, other: Tensors) -> Any:
    names = ("module.encoder.fc.0.weight", "module.predictor.0.weight")
    return {"epoch": 1, "state_dict": {**with_prefix(r, "module.encoder."), **head(*names)}}


def simclr(r: Tensors, other: Tensors) -> Any:
    return {"state_dict": {**with_prefix(r, "backbone."), **head("backbone.fc.0.weight")}}


def byol(r: Tensors, other: Tensors) -> Any:
    return {
        **with_prefix(r, "online_encoder.net."),
        **with_prefix(other, "target_encoder.net."),
        **head("online_predictor.net.0.weight"),
    }


def mmselfsup(r: Tensors, other: Tensors) -> Any:
    state = {**with_prefix(r, "backbone."), **head("neck.mlp.0.weight", "head.fc_cls.weight")}
    return {"meta": {"epoch": 200, "config": "model = dict()"}, "state_dict": state}


def pixpro(r: Tensors, other: Tensors) -> Any:
    state = {
        **with_prefix(r, "module.encoder."),
        **with_prefix(other, "module.encoder_k."),
        **head("module.projector.linear1.weight", "module.projector_k.linear1.weight"),
    }
    return {"opt": argparse.Namespace(arch="resnet50"), "model": state}


def transformers(r: Tensors, other: Tensors) -> Any:
    names = {name: translate(name, TORCHVISION, TRANSFORMERS) for name in r}
    state = {f"resnet.{new}": r[name] for name, new in names.items() if new}
    return {**state, **head("classifier.1.weight")}


def lightly(r: Tensors, other: Tensors) -> Any:
    state = {**in_sequence(r, "backbone."), **in_sequence(other, "backbone_momentum.")}
    return {"state_dict": {**state, **head("projection_head.layers.0.weight")}, "epoch": 2}


def fastai(r: Tensors, other: Tensors) -> Any:
    return {"model": {**in_sequence(r, "0."), **head("1.8.weight")}, "opt": _optimizer(r)}


def sequential_stem(r: Tensors, other: Tensors) -> Any:
    return {f"backbone.{translate(n, TORCHVISION, SEQUENTIAL_STEM)}": r[n] for n in _translated(r)}


def layer0(r: Tensors, other: Tensors) -> Any:
    stem = {"conv1.": "layer0.0.", "bn1.": "layer0.1."}
    return {
        next((new + n[len(old) :] for old, new in stem.items() if n.startswith(old)), n): t
        for n, t in r.items()
    }


def fsdp(r: Tensors, other: Tensors) -> Any:
    """Sharded by block, recomputed by block, compiled, and all of it in DDP."""
    block = re.compile(r"(layer\d)\.(\d+)\.")
    inside = r"\1._fsdp_wrapped_module.\2._checkpoint_wrapped_module.module."
    return {"model": with_prefix({block.sub(inside, n): t for n, t in r.items()}, "_orig_mod.")}


def detectron2_backbone(r: Tensors, other: Tensors) -> Any:
    model = {name: tensor.numpy() for name, tensor in in_detectron2(r).items()}
    return {"model": model, "__author__": "somebody", "matching_heuristics": True}


def detectron2_detector(r: Tensors, other: Tensors) -> Any:
    state = in_detectron2(r, "backbone.bottom_up.")
    return {"model": {**state, **head("roi_heads.box_predictor.cls_score.weight")}, "iteration": 9}


def detectron2_c4(r: Tensors, other: Tensors) -> Any:
    state = {
        ("roi_heads." if name.startswith("res5.") else "backbone.") + name: tensor
        for name, tensor in in_detectron2(r).items()
    }
    extra = head("roi_heads.box_predictor.cls_score.weight", "roi_heads.res5.norm.weight")
    return {"model": {**state, **extra}}


def msra(r: Tensors, other: Tensors) -> Any:
    names = {name: translate(name, TORCHVISION, CAFFE2) for name in r}
    blobs = {new: r[name].numpy() for name, new in names.items() if new}
    blobs |= {f"{new}_momentum": array * 0 for new, array in list(blobs.items())}
    return {"blobs": {**blobs, "fc1000_w": torch.ones(3, 2).numpy()}}


@dataclass(frozen=True)
class Example:
    """A layout's file.

    Attributes:
        make: (the ResNet that is to be found, another one) -> the file's content.
        layout, copy: what it is recognised as.
        suffix: of the file; decides how it is written.
        folded: whether running statistics are folded into the norms.
        says_pixels: whether the layout says how the network must be fed.
    """

    make: Callable[[Tensors, Tensors], Any]
    layout: str
    copy: str
    suffix: str = ".pth"
    folded: bool = False
    says_pixels: bool = True

    def write(self, folder: Path, resnet: Tensors, other: Tensors) -> Path:
        return write(folder / f"{self.make.__name__}{self.suffix}", self.make(resnet, other))


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        # .tar is what older projects call files that torch wrote before it used zip archives.
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".tar")
    return path


EXAMPLES = {
    "virtex": Example(virtex, "virtex", "visual"),
    "virtex in DDP": Example(virtex_ddp, "virtex", "visual"),
    "torchvision": Example(torchvision, "torchvision", "model"),
    "torchvision as safetensors": Example(torchvision, "torchvision", "model", ".safetensors"),
    "timm with EMA": Example(timm_ema, "torchvision", "model"),
    "moco v2": Example(moco, "moco", "query", ".tar"),
    "moco v3": Example(moco_v3, "moco-v3", "base"),
    "swav": Example(swav, "swav", "model", ".tar"),
    "dino": Example(dino, "dino", "teacher"),
    "barlow twins": Example(barlow_twins, "backbone", "backbone"),
    "vicregl": Example(vicregl, "backbone", "backbone"),
    "simsiam": Example(simsiam, "simsiam", "encoder"),
    "simclr": Example(simclr, "backbone", "backbone"),
    "byol": Example(byol, "byol", "online", ".pt"),
    "mmselfsup": Example(mmselfsup, "backbone", "backbone"),
    "pixpro": Example(pixpro, "pixpro", "encoder"),
    "detectron2 backbone": Example(
        detectron2_backbone, "detectron2", "backbone", ".pkl", says_pixels=False
    ),
    "transformers": Example(transformers, "transformers", "model", ".safetensors"),
    "lightly": Example(lightly, "sequential", "backbone"),
    "fastai": Example(fastai, "sequential", "backbone"),
    "sequential stem": Example(sequential_stem, "sequential-stem", "backbone"),
    "layer0": Example(layer0, "torchvision", "model"),
    "fsdp": Example(fsdp, "torchvision", "model"),
    "msra": Example(msra, "msra", "model", ".pkl", folded=True),
}
DETECTORS = {"FPN detector": detectron2_detector, "C4 detector": detectron2_c4}
