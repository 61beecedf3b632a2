"""One ResNet, written as other programs expect it."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import nn

import virtex_d2
from virtex_d2.checkpoint.layouts import DETECTRON2, SUFFIXES, TORCHVISION, translate
from virtex_d2.checkpoint.probe import TOLERANCE, ProbeResult, probe
from virtex_d2.checkpoint.restorers import find_ipt
from virtex_d2.checkpoint.source import (
    Backbone,
    Source,
    local_path,
    read_backbone,
)
from virtex_d2.engine.backbone_file import IMAGENET_RGB, Preprocessing, write_backbone
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path, sha256, write_safetensors


def convert(
    source: str,
    dest: str,
    to: str,
    layout: str = "",
    copy: str = "",
    prefix: str = "",
    overwrite: bool = False,
) -> Backbone:
    """Read a checkpoint of any layout and write its ResNet alone; atomic.

    Args:
        source: the checkpoint.
        dest: the file to write.
        to: "backbone" (this project's file, .safetensors), "detectron2" (.pkl, for stock
            detectron2), "torchvision" or "timm" (.pth or .safetensors; both use the same names).
        layout, copy, prefix: as in `source.read_backbone`.
        overwrite: whether `dest` may exist.
    """
    if to not in SUFFIXES:
        raise InputError(f"--to {to}: expected one of {', '.join(SUFFIXES)}.")
    if Path(dest).suffix not in SUFFIXES[to]:
        raise InputError(
            f"{dest}: a file of format {to} ends in {' or '.join(SUFFIXES[to])}; its readers go by "
            "that."
        )
    if Path(dest).exists() and not overwrite:
        raise InputError(f"{dest}: exists already. Choose another name, or add --overwrite.")
    backbone = read_backbone(local_path(source), layout, copy, prefix)
    try:
        _WRITERS[to](Path(dest), backbone)
    except OSError as error:
        raise InputError(f"{dest}: cannot be written: {error.strerror}.") from error
    return replace(backbone, notes=(*backbone.notes, *_notes(to, backbone)))


def _notes(to: str, backbone: Backbone) -> list[str]:
    """What the reader of a file must do that the file cannot make it do."""
    if to == "backbone":
        return []
    notes = []
    if backbone.preprocessing is None:
        notes.append("nobody says what its network was trained with")
    else:
        keys = backbone.preprocessing.config().items()
        notes.append(
            "feed it with "
            + ", ".join(
                f"{key} {value}{' (assumed)' if key in backbone.assumed else ''}"
                for key, value in keys
            )
        )
    if to == "detectron2":
        notes.append("detectron2's own defaults are others")
    else:
        notes.append("there is no classifier: load_state_dict(..., strict=False)")
        if backbone.preprocessing != IMAGENET_RGB:
            notes.append("readers will take it for RGB with ImageNet's mean and std")
    return notes


def verify(path: str, original: Backbone) -> ProbeResult:
    """Read a converted file again and compare it with what it was made from.

    Every tensor must be the same bit for bit; then detectron2's ResNet takes them, and its stages
    are compared with the original's.
    """
    written = read_backbone(path)
    different = [
        name
        for name, tensor in original.tensors.items()
        if not torch.equal(tensor, written.tensors[name])
    ]
    if different:
        raise InputError(f"{path}: {len(different)} tensors differ, the first: {different[0]}.")
    preprocessing = original.preprocessing or Preprocessing("RGB", (0.0,) * 3, (1.0,) * 3, False)
    model = _StockNetwork(original, preprocessing)
    state = model.backbone.state_dict()
    for name, tensor in written.tensors.items():
        state[translate(name, TORCHVISION, DETECTRON2)].copy_(tensor)
    result = probe(model, original, preprocessing, preprocessing.channel_order)
    if not result.passed:
        raise InputError(
            f"{path}: the network in it computes something else than {original.path} (relative "
            f"error by stage: {result.summary()}; at most {TOLERANCE:g}): {result.cause}."
        )
    return result


def inspect(path: str, layout: str = "", copy: str = "", prefix: str = "") -> dict[str, object]:
    """What a file is, for people and programs; nothing is loaded into a model.

    Returns:
        "found" (every ResNet in it: place, prefix, layouts and copies), and of the one that would
        be taken: "layout", "copy", "architecture", "tensors", "preprocessing" (config keys, None
        where it is not known), "assumed" (those of the keys that the file does not say), "dropped",
        "beside", "notes", "metadata", "sha256". Of an IPT, in which there is no ResNet: "path",
        "sha256", "layout", "architecture", "config" (see `restorers.find_ipt`), "found", "notes"
        and "metadata".
    """
    source = Source(local_path(path))
    if not source.resnets and (ipt := find_ipt(source.states)):
        return {
            "path": source.path,
            "sha256": sha256(source.path),
            "layout": "ipt",
            "architecture": "IPT, which restores images",
            "config": ipt,
            "found": [],
            "notes": ["there is no ResNet in it: tools/restore_images.py uses it"],
            "metadata": source.stored.metadata,
        }
    backbone = source.backbone(layout, copy, prefix)
    return {
        "path": backbone.path,
        "sha256": backbone.sha256,
        "layout": backbone.layout,
        "copy": backbone.copy,
        "architecture": backbone.architecture.name,
        "config": backbone.architecture.config(),
        "tensors": len(backbone.tensors),
        "preprocessing": backbone.preprocessing and backbone.preprocessing.config(),
        "assumed": list(backbone.assumed) if backbone.preprocessing else [],
        "found": [
            {
                "place": found.container,
                "prefix": found.prefix,
                "layouts": [f"{entry.name}: {one.name}" for entry, one in found.layouts],
            }
            for found in source.resnets
        ],
        "dropped": list(backbone.dropped),
        "beside": list(backbone.beside),
        "notes": list(backbone.notes),
        "metadata": backbone.metadata,
    }


def _metadata(backbone: Backbone) -> dict[str, str]:
    """Of the file to be written: the source's own entries, and how it must be fed."""
    entries = {
        "source": f"{backbone.layout} {backbone.copy}",
        **backbone.metadata,
        "architecture": backbone.architecture.name,
        "source_sha256": backbone.sha256,
        "virtex_d2_version": virtex_d2.__version__,
    }
    if backbone.preprocessing:
        entries |= backbone.preprocessing.metadata() | {"assumed": ",".join(backbone.assumed)}
    return entries


def _write_backbone(dest: Path, backbone: Backbone) -> None:
    if backbone.preprocessing is None:
        doubt = f": {backbone.doubts[0]}" if backbone.doubts else ""
        raise InputError(
            f"{backbone.path}: layout {backbone.layout} does not say what the network was trained "
            f"with, which a backbone file must{doubt}. Convert with --to detectron2, and set the "
            "four keys where it is used."
        )
    name, metadata = backbone.architecture.name, _metadata(backbone)
    write_backbone(dest, backbone.tensors, name, backbone.preprocessing, metadata)


def _write_detectron2(dest: Path, backbone: Backbone) -> None:
    content = {
        "model": {
            translate(name, TORCHVISION, DETECTRON2): tensor.numpy()
            for name, tensor in backbone.tensors.items()
        },
        # Stock detectron2 looks for this key: without it the file is taken for Caffe2's, and the
        # running statistics are left behind; and without the other no name matches.
        "__author__": "VirTex-D2",
        "matching_heuristics": True,
        "virtex_d2": _metadata(backbone),
    }
    with atomic_path(dest) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=4)


def _write_torchvision(dest: Path, backbone: Backbone) -> None:
    if dest.suffix == ".safetensors":
        entries = {k: v for k, v in _metadata(backbone).items() if not k.startswith("format")}
        write_safetensors(dest, backbone.tensors, entries)
        return
    with atomic_path(dest) as temporary:
        torch.save(dict(backbone.tensors), temporary)


_WRITERS: dict[str, Callable[[Path, Backbone], None]] = {
    "backbone": _write_backbone,
    "detectron2": _write_detectron2,
    "torchvision": _write_torchvision,
    "timm": _write_torchvision,
}


class _StockNetwork(nn.Module):
    """detectron2's own ResNet, fed as a detector feeds it."""

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing):
        super().__init__()
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        for key, value in {**backbone.architecture.config(), **preprocessing.config()}.items():
            cfg.merge_from_list([key, value])
        self.backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        self.pixel_mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
        self.pixel_std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
