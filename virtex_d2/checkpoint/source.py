"""A checkpoint of any known layout -> a ResNet in torchvision's names, complete and checked."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from virtex_d2.checkpoint.choice import choose
from virtex_d2.checkpoint.layouts import STRIDE, Found, Preprocessing, find_resnets
from virtex_d2.checkpoint.naming import (
    CAFFE2,
    DETECTRON2,
    TORCHVISION,
    is_counter,
    looks_like_backbone,
    translate,
    unwrapped,
)
from virtex_d2.checkpoint.reading import StoredCheckpoint, read_tensors
from virtex_d2.checkpoint.resnet import ResNet, recognise_resnet
from virtex_d2.checkpoint.statements import PIXELS, Statement, hear, weigh
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import sha256

FORMAT = "virtex_d2.backbone"
FORMAT_VERSION = "1"
OWN_LAYOUT = "backbone file"
_REQUIRED = ("architecture", "channel_order", "pixel_mean", "pixel_std", "stride_in_1x1")
_DEEPEST = 4  # levels of dicts that are looked into for state dicts

# FrozenBN's and Caffe2's epsilon: what detectron2 subtracts where statistics are folded.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Backbone:
    """A ResNet that was found in a file.

    Attributes:
        path, sha256: the file.
        layout, copy: whose it is, and which of the networks in it.
        architecture: depth and widths.
        tensors: all of the ResNet's by torchvision name, float32 on the CPU.
        names: torchvision name -> name in the file; without those that the file did not hold.
        preprocessing: what it was trained with; None where neither the file nor its layout says so,
            or there are `doubts`.
        assumed: the config keys of it that the file does not say.
        doubts: sentences on what the file says or holds that contradicts itself or its layout.
        metadata: the file's, where it is a backbone file.
        dropped: the other names in the same state dict (heads, projectors, counters).
        beside: paths of what else the file holds (optimizer, other copies).
        notes: what a careful user would like to know.
    """

    path: str
    sha256: str
    layout: str
    copy: str
    architecture: ResNet
    tensors: dict[str, torch.Tensor] = field(repr=False)
    names: dict[str, str] = field(repr=False)
    preprocessing: Preprocessing | None
    assumed: tuple[str, ...]
    doubts: tuple[str, ...]
    metadata: dict[str, str]
    dropped: tuple[str, ...]
    beside: tuple[str, ...]
    notes: tuple[str, ...]

    def original(self, name: str) -> str:
        """What the file calls a tensor."""
        return self.names.get(name, name)


def read_backbone(path: str, layout: str = "", copy: str = "", prefix: str = "") -> Backbone:
    """Find the ResNet in a checkpoint, whatever project wrote it.

    Args:
        path: .pth, .pt, .bin, .tar, .safetensors or .pkl; told by content.
        layout: a name in `layouts.LAYOUTS`, where the keys alone do not decide; its prefix need not
            fit then.
        copy: the network to take where a file holds several, e.g. "student".
        prefix: what stands before the names of the network to take, behind the place of its state
            dict if need be: "online.net.", "state_dict/online.net.".
    """
    stored = read_tensors(path)
    containers = dict(_state_dicts(stored.content))
    own = stored.metadata.get("format") == FORMAT
    if own:
        found, chosen = Found("", "", TORCHVISION, ()), (OWN_LAYOUT, "model")
        usual = _own_preprocessing(path, stored.metadata)
    else:
        found, (entry, one) = choose(path, containers, layout, copy, prefix)
        if entry.refusal:
            raise InputError(f"{path}: cannot be loaded: {entry.refusal}.")
        chosen, usual = (entry.name, one.name), entry.preprocessing
    raw, names, dropped = _collect(path, containers[found.container], found)
    tensors, notes = _as_float32(path, raw, names)
    architecture = recognise_resnet(tensors, path)
    if found.naming is CAFFE2:
        notes += _add_folded_statistics(tensors)
    _check(path, tensors, names, architecture)
    folded = found.naming is not CAFFE2 and _is_folded(tensors)
    said, doubts = weigh(hear(stored.content, stored.metadata, containers), architecture)
    preprocessing, assumed = _preprocessing(usual, said, architecture)
    unsaid = not said.keys() >= set(PIXELS)
    if unsaid and found.naming is CAFFE2 and architecture.groups > 1:
        doubts.append(
            "it is a ResNeXt in Caffe2's names; detectron2's were not trained as its ResNets: std "
            "57.375, 57.12, 58.395, stride in the 3x3 convolutions"
        )
    if unsaid and folded:
        doubts.append(
            "all of its norms have running statistics of 0 and 1: they are folded into the norms' "
            "weights, as in Caffe's networks (BGR, std 1, stride in the 1x1 convolutions), or they "
            "were never trained"
        )
    notes += _notes(stored, tensors, names, folded)
    notes += [f"{doubt}; VIRTEX.PREPROCESSING config vouches for it" for doubt in doubts]
    return Backbone(
        path=str(path),
        sha256=sha256(path),
        layout=chosen[0],
        copy=chosen[1],
        architecture=architecture,
        tensors=tensors,
        names=names,
        preprocessing=None if doubts else preprocessing,
        assumed=assumed,
        doubts=tuple(doubts),
        metadata=stored.metadata,
        dropped=tuple(sorted(dropped)),
        beside=tuple(sorted(_beside(stored.content, found.container))),
        notes=tuple(notes),
    )


def find_layouts(path: str) -> list[Found]:
    """Every ResNet in a file with the layouts that fit it; empty where there is none."""
    containers = dict(_state_dicts(read_tensors(path).content))
    return find_resnets({place: list(state) for place, state in containers.items()})


def holds_detector(path: str) -> bool:
    """Whether a file is of a whole detector, which is loaded as detectron2 does."""
    return any(fit[0].detector for found in find_layouts(path) for fit in found.layouts)


def _state_dicts(
    content: Any, place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Path and tensors of every dict that holds tensors by name."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _state_dicts(value, f"{place}/{key}".removeprefix("/"), depth + 1)


def _collect(
    path: str, state: Mapping[str, torch.Tensor], found: Found
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """The ResNet's tensors by torchvision name, their names in the file, and what is left out."""
    raw: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    dropped: list[str] = []
    strange: list[str] = []
    for name, original in unwrapped(state).items():
        tensor, prefix = state[original], found.prefix
        if found.naming is DETECTRON2 and name.startswith("roi_heads.res5."):
            prefix = "roi_heads."  # where C4 detectors keep their last stage
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        target = inside and translate(inside, found.naming, TORCHVISION)
        if target and target not in raw:
            raw[target], names[target] = tensor, original
            continue
        dropped.append(original)
        if inside and not _harmless(inside, tensor) and looks_like_backbone(inside):
            strange.append(original)
    if strange:
        raise InputError(
            f"{path}: {len(strange)} tensors that detectron2's ResNet has no place for, the first: "
            f"{', '.join(strange[:5])}. The network is of another architecture (deep stem, squeeze "
            "and excitation, other norms); nothing was loaded."
        )
    return raw, names, dropped


def _harmless(name: str, tensor: torch.Tensor) -> bool:
    if is_counter(name) or name.endswith("_momentum"):
        return True
    if re.fullmatch(r"res5\.norm\.\w+", name):  # C4's extra norm, which is the detector's
        return True
    # A bias that is never used: of Caffe's stem, or of any convolution before a norm.
    convolution = r"(.*\.)?(conv\d|convolution|shortcut|downsample\.0|0)\.bias|conv1_b"
    return re.fullmatch(convolution, name) is not None and not tensor.any()


def _as_float32(
    path: str, raw: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    kinds = {tensor.dtype for tensor in raw.values()}
    for name, tensor in raw.items():
        if not tensor.dtype.is_floating_point:
            raise InputError(
                f"{path}: {names[name]} is {tensor.dtype}; expected floating-point weights."
            )
    tensors = {name: raw[name].to(torch.float32).contiguous() for name in raw}
    others = sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32})
    return tensors, [f"stored as {', '.join(others)}, converted to float32"] if others else []


def _add_folded_statistics(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Running statistics that leave a norm its affine part, as detectron2's FrozenBN starts."""
    for name in [name for name in tensors if _is_norm_weight(name, tensors)]:
        base = name.removesuffix("weight")
        tensors[base + "running_mean"] = torch.zeros_like(tensors[name])
        tensors[base + "running_var"] = torch.full_like(tensors[name], 1.0 - _EPSILON)
    return ["running statistics are folded into the norms' weights: mean 0 and variance 1 were set"]


def _is_folded(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether no norm of a trained network has statistics: mean 0, variance 1, or what
    `_add_folded_statistics` sets.
    """
    means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
    variances = [tensor for name, tensor in tensors.items() if name.endswith("running_var")]
    if any(mean.any() for mean in means) or any((v - 1).abs().max() > 2e-5 for v in variances):
        return False
    weights = [tensors[name] for name in tensors if _is_norm_weight(name, tensors)]
    return any((weight != 1).any() and weight.any() for weight in weights)


def _preprocessing(
    usual: Preprocessing | None, said: Mapping[str, Statement], architecture: ResNet
) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """What a file says, completed by what its layout assumes; and the keys that are assumed."""
    assumed = tuple(key for key in PIXELS if key not in said or said[key].assumed)
    values = {**(usual.config() if usual else {}), **{key: s.value for key, s in said.items()}}
    if not architecture.bottleneck:  # basic blocks have no 1x1 convolutions
        values.setdefault(STRIDE, False)
    return (Preprocessing.of_config(values) if len(values) == len(PIXELS) else None), assumed


def _is_norm_weight(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    return name.endswith(".weight") and tensors[name].dim() == 1


def _check(
    path: str,
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    architecture: ResNet,
) -> None:
    shapes = architecture.shapes()
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [
        f"{names[name]} has no place in a {architecture.name}"
        for name in tensors
        if name not in shapes
    ]
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        found, told = tuple(tensors[name].shape), names.get(name, name)
        if found != shape:
            turned = " (its dimensions are swapped)" if sorted(found) == sorted(shape) else ""
            problems.append(f"{told} has shape {found}, expected {shape}{turned}")
        elif not torch.isfinite(tensors[name]).all():
            problems.append(f"{told} holds NaN or Inf")
        elif name.endswith("running_var") and (tensors[name] < 0).any():
            problems.append(f"{told} holds a negative variance")
    if problems:
        raise InputError(
            f"{path}: not a whole {architecture.name}, nothing was loaded; {len(problems)} "
            f"problems, the first: {'; '.join(problems[:5])}."
        )


def _notes(
    stored: StoredCheckpoint,
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    folded: bool,
) -> list[str]:
    notes = []
    if stored.foreign:
        notes.append(
            f"objects of {', '.join(stored.foreign)} in the file were not built; no code of it ran"
        )
    untrained = [
        names[name]
        for name in names
        if name.endswith("running_mean")
        and not tensors[name].any()
        and (tensors[name.removesuffix("mean") + "var"] == 1).all()
    ]
    if untrained and not folded:
        notes.append(
            f"{len(untrained)} norms have running statistics that were never trained (mean 0, "
            f"variance 1), the first: {untrained[0]}. Do not freeze them: use SyncBN or BN and "
            "MODEL.BACKBONE.FREEZE_AT 0"
        )
    return notes


def _beside(content: Any, container: str) -> list[str]:
    top = container.partition("/")[0]
    if not isinstance(content, Mapping) or not container:
        return []
    return [str(key) for key in content if key != top]


def detector_says(path: str) -> tuple[dict[str, object], list[str]]:
    """What a detector's checkpoint says of its pixels and stride, by config key, and what
    contradicts itself.
    """
    stored = read_tensors(path)
    states = dict(_state_dicts(stored.content))
    said, doubts = weigh(hear(stored.content, stored.metadata, states), None)
    return {key: statement.value for key, statement in said.items()}, doubts


def _own_preprocessing(path: str, metadata: Mapping[str, str]) -> Preprocessing:
    advice = "tools/pretrain_net.py and tools/convert_checkpoint.py write such files."
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: expected format_version {FORMAT_VERSION}, found "
            f"{metadata.get('format_version')!r}. It is of another version of this project."
        )
    lacking = [key for key in _REQUIRED if key not in metadata]
    if lacking:
        raise InputError(f"{path}: its metadata lacks {', '.join(lacking)}. {advice}")
    numbers = {}
    for key in ("pixel_mean", "pixel_std"):
        try:
            numbers[key] = tuple(float(value) for value in metadata[key].split(","))
        except ValueError as error:
            raise InputError(
                f"{path}: expected numbers with commas in its metadata's {key}, found "
                f"{metadata[key]!r}. {advice}"
            ) from error
    return Preprocessing(
        metadata["channel_order"],
        numbers["pixel_mean"],
        numbers["pixel_std"],
        metadata["stride_in_1x1"] == "true",
    )
