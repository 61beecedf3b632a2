"""A checkpoint of any known layout -> a ResNet in torchvision's names, complete and checked."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from virtex_d2.runtime.errors import InputError, nearest
from virtex_d2.runtime.files import sha256

from .architecture import ResNet, recognise_resnet
from .layouts import LAYOUTS, Copy, Found, Layout, Preprocessing, find_resnets
from .naming import CAFFE2, DETECTRON2, TORCHVISION, is_counter, looks_like_backbone, translate
from .reading import StoredCheckpoint, read_tensors

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
        preprocessing: what it was trained with; None where the file does not say.
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
    metadata: dict[str, str]
    dropped: tuple[str, ...]
    beside: tuple[str, ...]
    notes: tuple[str, ...]

    def original(self, name: str) -> str:
        """What the file calls a tensor."""
        return self.names.get(name, name)


def read_backbone(path: str, layout: str = "", copy: str = "") -> Backbone:
    """Find the ResNet in a checkpoint, whatever project wrote it.

    Args:
        path: .pth, .pt, .bin, .tar, .safetensors or .pkl; told by content.
        layout: a name in `layouts.LAYOUTS`, where the keys alone do not decide; its prefix need not
            fit then.
        copy: the network to take where a file holds several, e.g. "student".

    Raises:
        InputError: the file cannot be read safely; it holds no ResNet, one that detectron2 cannot
            build, several, or an incomplete one; a tensor has another shape or is not finite.
    """
    stored = read_tensors(path)
    containers = dict(_state_dicts(stored.content))
    if stored.metadata.get("format") == FORMAT:
        found, chosen = Found("", "", TORCHVISION, ()), (OWN_LAYOUT, "model")
        preprocessing = _own_preprocessing(path, stored.metadata)
    else:
        found, (entry, one) = _choose(path, containers, layout, copy)
        if entry.refusal:
            raise InputError(f"{path}: cannot be loaded: {entry.refusal}.")
        chosen, preprocessing = (entry.name, one.name), entry.preprocessing
        preprocessing = _embedded_preprocessing(path, stored.content) or preprocessing
    raw, names, dropped = _collect(path, containers[found.container], found)
    tensors, notes = _as_float32(path, raw, names)
    architecture = recognise_resnet(tensors, path)
    if found.naming is CAFFE2:
        notes += _add_folded_statistics(tensors)
    _check(path, tensors, names, architecture)
    notes += _notes(stored, tensors, names)
    return Backbone(
        path=str(path),
        sha256=sha256(path),
        layout=chosen[0],
        copy=chosen[1],
        architecture=architecture,
        tensors=tensors,
        names=names,
        preprocessing=preprocessing,
        metadata=stored.metadata,
        dropped=tuple(sorted(dropped)),
        beside=tuple(sorted(_beside(stored.content, found.container))),
        notes=tuple(notes),
    )


def find_layouts(path: str) -> list[tuple[Found, tuple[tuple[Layout, Copy], ...]]]:
    """Every ResNet in a file with the layouts that fit it; empty where there is none.

    Raises:
        InputError: the file cannot be read safely.
    """
    containers = dict(_state_dicts(read_tensors(path).content))
    names = {place: list(state) for place, state in containers.items()}
    return [(found, found.layouts) for found in find_resnets(names)]


def holds_detector(path: str) -> bool:
    """Whether a file is of a whole detector, which is loaded as detectron2 does."""
    return any(layout.detector for _, fits in find_layouts(path) for layout, _ in fits)


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


def _choose(
    path: str, containers: Mapping[str, Mapping], layout: str, copy: str
) -> tuple[Found, tuple[Layout, Copy]]:
    known = {entry.name: entry for entry in LAYOUTS}
    if layout and layout not in known:
        raise InputError(
            f"layout '{layout}': expected one of {', '.join(known)}.{nearest(layout, known)}"
        )
    resnets = find_resnets({place: list(state) for place, state in containers.items()})
    if not resnets:
        raise InputError(_no_resnet(path, containers))
    options = [(found, fit) for found in resnets for fit in found.layouts]
    if layout:
        options = [option for option in options if option[1][0].name == layout]
        if not options:
            options = _forced(path, resnets, known[layout])
    if not options:
        places = "; ".join(_place(found) for found in resnets)
        raise InputError(
            f"{path}: a ResNet in {resnets[0].naming.name}'s names, but in a place that no known "
            f"layout has: {places}. If it is the one you mean, say how to take it: layout "
            f"'{resnets[0].naming.name}' (--layout, or VIRTEX.LAYOUT)."
        )
    projects = {fit[0].name for _, fit in options}
    if len(projects) > 1:
        places = "; ".join(f"{fit[0].name} in {_place(found)}" for found, fit in options)
        raise InputError(
            f"{path}: fits several layouts: {places}. Choose one with --layout or VIRTEX.LAYOUT."
        )
    entry = options[0][1][0]
    copies = [one.name for one in entry.copies]
    if copy and copy not in copies:
        raise InputError(
            f"copy '{copy}': layout {entry.name} has {', '.join(copies)}.{nearest(copy, copies)}"
        )
    wanted = copy or copies[0]
    taken = [option for option in options if option[1][1].name == wanted]
    if not taken:
        there = sorted({fit[1].name for _, fit in options})
        raise InputError(
            f"{path}: layout {entry.name} without its copy '{wanted}'; it holds {', '.join(there)}."
            f" Choose it with --copy or VIRTEX.COPY."
        )
    if len(taken) > 1:
        places = "; ".join(_place(found) for found, _ in taken)
        raise InputError(
            f"{path}: the same network in several places: {places}. Save the one you mean alone: "
            "torch.save({'model': state_dict}, path)."
        )
    return taken[0]


def _forced(
    path: str, resnets: list[Found], layout: Layout
) -> list[tuple[Found, tuple[Layout, Copy]]]:
    fitting = [found for found in resnets if found.naming is layout.naming]
    if len(fitting) != 1:
        places = "; ".join(_place(found) for found in resnets)
        raise InputError(
            f"{path}: layout {layout.name} fits {len(fitting)} of the ResNets in it ({places}); "
            "expected one."
        )
    return [(fitting[0], (layout, layout.copies[0]))]


def _place(found: Found) -> str:
    return f"{found.container or 'the top level'}: {found.prefix or 'no prefix'}"


def _no_resnet(path: str, containers: Mapping[str, Mapping]) -> str:
    if not containers:
        return f"{path}: holds no tensors by name. MODEL.WEIGHTS takes a checkpoint with a ResNet."
    place, state = max(containers.items(), key=lambda item: len(item[1]))
    first = ", ".join(list(state)[:3])
    what = "It looks like a vision transformer; " if any("blocks." in n for n in state) else ""
    return (
        f"{path}: no ResNet found among the {len(state)} tensors of {place or 'the top level'}, "
        f"which begin with {first}. {what}MODEL.WEIGHTS takes the layouts of docs/checkpoints.md."
    )


def _collect(
    path: str, state: Mapping[str, torch.Tensor], found: Found
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """The ResNet's tensors by torchvision name, their names in the file, and what is left out."""
    raw: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    dropped: list[str] = []
    strange: list[str] = []
    for name, tensor in state.items():
        prefix = found.prefix
        if found.naming is DETECTRON2 and name.startswith("roi_heads.res5."):
            prefix = "roi_heads."  # where C4 detectors keep their last stage
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        target = inside and translate(inside, found.naming, TORCHVISION)
        if target:
            raw[target], names[target] = tensor, name
            continue
        dropped.append(name)
        if inside and not _harmless(inside, tensor) and looks_like_backbone(inside):
            strange.append(name)
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
    # Caffe2's stem convolution has a bias that is never used.
    return name == "conv1_b" and not tensor.any()


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
    stored: StoredCheckpoint, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]
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
    if untrained:
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


def _embedded_preprocessing(path: str, content: Any) -> Preprocessing | None:
    """What tools/convert_checkpoint.py or a detector's training wrote beside the tensors."""
    entries = content.get("virtex_d2") if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or "pixel_mean" not in entries:
        return None
    texts = {str(key): str(value) for key, value in entries.items()}
    return _own_preprocessing(path, {"architecture": "", **texts, "format_version": FORMAT_VERSION})


def detector_preprocessing(path: str) -> Preprocessing | None:
    """What a detector's checkpoint was trained with; None where it does not say.

    Raises:
        InputError: the file cannot be read safely.
    """
    return _embedded_preprocessing(path, read_tensors(path).content)


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
