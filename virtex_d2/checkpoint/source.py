"""A checkpoint of any known layout -> a ResNet in torchvision's names, complete and checked."""

import functools
import http.client
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import detectron2.checkpoint  # noqa: F401  # registers catalog://
import torch
from detectron2.utils.file_io import PathManager

from virtex_d2.checkpoint.layouts import (
    CAFFE2,
    DETECTRON2,
    LAYOUTS,
    TORCHVISION,
    Copy,
    Found,
    Layout,
    find_resnets,
    is_counter,
    looks_like_backbone,
    translate,
    unwrapped,
)
from virtex_d2.checkpoint.resnet import ResNet, median_scale, recognise_resnet
from virtex_d2.checkpoint.restorers import find_ipt
from virtex_d2.checkpoint.statements import PIXELS, Statement, hear, weigh
from virtex_d2.engine.backbone_file import (
    STRIDE,
    Preprocessing,
    is_backbone_file,
    preprocessing_of,
)
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import sha256
from virtex_d2.engine.safe_load import StoredCheckpoint, read_tensors

OWN_LAYOUT = "backbone file"
_DEEPEST = 4  # levels of dicts that are looked into for state dicts

# FrozenBN's and Caffe2's epsilon: what detectron2 subtracts where statistics are folded.
_EPSILON = 1e-5

# --- MODEL.WEIGHTS as an address

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FETCHED = ("http", "https", "ftp", "detectron2", "catalog")
_PATIENCE = 60.0  # seconds without a byte


def local_path(weights: str) -> str:
    """MODEL.WEIGHTS as a file of this machine; what has a scheme (https://, detectron2://) is
    fetched by detectron2 into its cache.
    """
    match = _ADDRESS.match(weights)
    if not match:
        return weights
    scheme = match[1].lower()
    if scheme == "file":
        return unquote(urlsplit(weights).path)
    advice = "Download it where that works, and give the file's path."
    if scheme not in _FETCHED:
        raise InputError(
            f"{weights}: {scheme}:// is not fetched here; expected a path, or one of "
            f"{', '.join(f'{name}://' for name in _FETCHED)}. {advice}"
        )
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        return PathManager.get_local_path(scheme + weights[len(scheme) :])
    except LookupError as error:
        raise InputError(f"{weights}: detectron2 has no {error}. {advice}") from error
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        text = str(error).removeprefix("<urlopen error ").rstrip(">")
        reason = " ".join(text.split()) or type(error).__name__
        raise InputError(f"{weights}: cannot be fetched: {reason}. {advice}") from error
    finally:
        socket.setdefaulttimeout(before)


# --- what is in a file


@dataclass(frozen=True)
class Backbone:
    """A ResNet that was found in a file."""

    path: str
    sha256: str  # of the file
    layout: str  # whose it is
    copy: str  # which of the networks in it
    architecture: ResNet
    tensors: dict[str, torch.Tensor] = field(repr=False)  # by torchvision name, float32 on the CPU
    names: dict[str, str] = field(repr=False)  # torchvision name -> name in the file, if there
    # What it was trained with; None where neither the file nor its layout says so, or in doubt.
    preprocessing: Preprocessing | None
    assumed: tuple[str, ...]  # the config keys of it that the file does not say
    doubts: tuple[str, ...]  # sentences on what contradicts itself or the layout
    metadata: dict[str, str]  # of a backbone file
    dropped: tuple[str, ...]  # the other names in the same state dict: heads, projectors, counters
    beside: tuple[str, ...]  # paths of what else the file holds: optimizer, other copies
    notes: tuple[str, ...]  # what a careful user would like to know
    # Whether running statistics are folded into the norms' weights, so that they are 0 and 1: then
    # no norm can be trained with a batch's statistics.
    folded: bool

    @property
    def last_norm_scale(self) -> float | None:
        """The median scale of the residual blocks' last norms; None where they are folded."""
        return None if self.folded else median_scale(self.architecture, self.tensors)


class Source:
    """A checkpoint file of anybody's, read at the first question, and once.

        source = Source(local_path(cfg.MODEL.WEIGHTS))
        if not source.is_detector:
            backbone = source.backbone()

    Args:
        path: .pth, .pt, .bin, .tar, .safetensors or .pkl; told by content.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self._backbones: dict[tuple[str, str, str], Backbone] = {}

    @functools.cached_property
    def stored(self) -> StoredCheckpoint:
        """All tensors and plain values of the file."""
        return read_tensors(self.path)

    @functools.cached_property
    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Its state dicts by place: the path of dict keys, joined by "/"."""
        return dict(_state_dicts(self.stored.content))

    @functools.cached_property
    def resnets(self) -> list[Found]:
        """Every ResNet in it with the layouts that fit; empty where there is none."""
        return find_resnets({place: list(state) for place, state in self.states.items()})

    @property
    def is_detector(self) -> bool:
        """Whether it is of a whole detector, which is loaded as detectron2 does."""
        return any(layout.detector for found in self.resnets for layout, _ in found.layouts)

    def statements(
        self, architecture: ResNet | None = None
    ) -> tuple[dict[str, Statement], list[str]]:
        """What it says of pixels and stride by config key, and what contradicts itself or, where it
        is given, the architecture of its tensors.
        """
        return weigh(hear(self.stored.content, self.stored.metadata, self.states), architecture)

    def backbone(self, layout: str = "", copy: str = "", prefix: str = "") -> Backbone:
        """Find the ResNet in the file, whatever project wrote it.

        Args:
            layout: a name in `layouts.LAYOUTS`, where the keys alone do not decide; its prefix need
                not fit then.
            copy: the network to take where a file holds several, e.g. "student".
            prefix: what stands before the names of the network to take, behind the place of its
                state dict if need be: "online.net.", "state_dict/online.net.".
        """
        which = (layout, copy, prefix)
        if which not in self._backbones:
            self._backbones[which] = self._find(*which)
        return self._backbones[which]

    def _find(self, layout: str, copy: str, prefix: str) -> Backbone:
        path, metadata = self.path, self.stored.metadata
        if is_backbone_file(metadata):
            found, chosen = Found("", "", TORCHVISION, ()), (OWN_LAYOUT, "model")
            usual = preprocessing_of(path, metadata)
        else:
            found, (entry, one) = _choose(self, layout, copy, prefix)
            if entry.refusal:
                raise InputError(f"{path}: cannot be loaded: {entry.refusal}.")
            chosen, usual = (entry.name, one.name), entry.preprocessing
        raw, names, dropped = _collect(path, self.states[found.container], found)
        tensors, notes = _as_float32(path, raw, names)
        architecture = recognise_resnet(tensors, path)
        if found.naming is CAFFE2:
            notes += _add_folded_statistics(tensors)
        _check(path, tensors, names, architecture)
        folded = found.naming is not CAFFE2 and _is_folded(tensors)
        said, doubts = self.statements(architecture)
        preprocessing, assumed = _preprocessing(usual, said, architecture)
        if not said.keys() >= set(PIXELS):
            doubts += _doubts_of_silence(found, architecture, folded)
        notes += _notes(self.stored, tensors, names, folded)
        notes += [f"{doubt}; VIRTEX.PREPROCESSING config vouches for it" for doubt in doubts]
        return Backbone(
            path=path,
            sha256=sha256(path),
            layout=chosen[0],
            copy=chosen[1],
            architecture=architecture,
            tensors=tensors,
            names=names,
            preprocessing=None if doubts else preprocessing,
            assumed=assumed,
            doubts=tuple(doubts),
            metadata=metadata,
            dropped=tuple(sorted(dropped)),
            beside=tuple(sorted(_beside(self.stored.content, found.container))),
            notes=tuple(notes),
            folded=folded or found.naming is CAFFE2,
        )


def read_backbone(path: str, layout: str = "", copy: str = "", prefix: str = "") -> Backbone:
    """The ResNet in a file, of which nothing else is asked; see `Source.backbone`."""
    return Source(path).backbone(layout, copy, prefix)


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


def _doubts_of_silence(found: Found, architecture: ResNet, folded: bool) -> list[str]:
    """What is odd about a network of which the file does not say how it was fed."""
    doubts = []
    if found.naming is CAFFE2 and architecture.groups > 1:
        doubts.append(
            "it is a ResNeXt in Caffe2's names; detectron2's were not trained as its ResNets: std "
            "57.375, 57.12, 58.395, stride in the 3x3 convolutions"
        )
    if folded:
        doubts.append(
            "all of its norms have running statistics of 0 and 1: they are folded into the norms' "
            "weights, as in Caffe's networks (BGR, std 1, stride in the 1x1 convolutions), or they "
            "were never trained"
        )
    return doubts


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


# --- which of the networks in a file is meant

_Option = tuple[Found, tuple[Layout, Copy]]


def _choose(source: Source, layout: str, copy: str, prefix: str) -> _Option:
    """The ResNet to take, and its layout and copy; arguments as in `Source.backbone`."""
    path, resnets = source.path, source.resnets
    known = {entry.name: entry for entry in LAYOUTS}
    if layout and layout not in known:
        raise InputError(
            f"layout '{layout}': expected one of {', '.join(known)}.{nearest(layout, known)}"
        )
    if not resnets:
        raise InputError(_no_resnet(path, source.states))
    if prefix:
        return _by_prefix(path, resnets, prefix, known.get(layout), copy)
    options = [(found, fit) for found in resnets for fit in found.layouts]
    if layout:
        options = [option for option in options if option[1][0].name == layout]
        options = options or _forced(path, resnets, known[layout])
    if not options:
        raise InputError(
            f"{path}: ResNets in places that no known layout has. {_say(resnets, resnets)}"
        )
    projects = {fit[0].name: None for _, fit in options}
    if len(projects) > 1:
        which = _say(resnets, (found for found, _ in options))
        raise InputError(f"{path}: fits several layouts: {', '.join(projects)}. {which}")
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
            " Choose it with --copy or VIRTEX.COPY."
        )
    if len(taken) > 1:
        raise InputError(
            f"{path}: the same network in several places. "
            f"{_say(resnets, (found for found, _ in taken))}"
        )
    return taken[0]


def _by_prefix(
    path: str, resnets: list[Found], prefix: str, layout: Layout | None, copy: str
) -> _Option:
    def ends(text: str) -> str:
        return text if text == "/" else text.rstrip(".")

    taken = [found for found in resnets if ends(prefix) == ends(found.place)]
    taken = taken or [found for found in resnets if ends(prefix) == ends(found.prefix)]
    if len(taken) != 1:
        how = "is of several ResNets" if taken else "is of none of the ResNets"
        raise InputError(f"{path}: prefix '{prefix}' {how}. {_say(resnets, taken or resnets)}")
    found = taken[0]
    if copy:
        raise InputError(
            f"{path}: --copy (VIRTEX.COPY) and --prefix (VIRTEX.PREFIX) both say which network; "
            "leave one out."
        )
    if layout and layout.naming is not found.naming:
        raise InputError(
            f"{path}: layout {layout.name} has {layout.naming.name}'s names, the ResNet of prefix "
            f"'{prefix}' has {found.naming.name}'s. Leave --layout (VIRTEX.LAYOUT) out."
        )
    fits = [fit for fit in found.layouts if layout in (None, fit[0])]
    if fits:
        return found, fits[0]
    named = [entry for entry in LAYOUTS if entry.naming is found.naming]
    plain = next((entry for entry in named if entry.name == found.naming.name), named[-1])
    return found, (layout or plain, Copy(ends(found.place), ""))


def _forced(path: str, resnets: list[Found], layout: Layout) -> list[_Option]:
    """A layout that was asked for: its copies behind any prefix, or the only ResNet there is."""
    fitting = [found for found in resnets if found.naming is layout.naming]
    options = [
        (found, (layout, copy))
        for found in fitting
        for copy in layout.copies
        if re.fullmatch(r"(.*\.)?" + copy.prefix, found.prefix)
        and re.fullmatch(copy.container, found.container)
    ]
    if options:
        return options
    if len(fitting) == 1:
        return [(fitting[0], (layout, layout.copies[0]))]
    raise InputError(f"{path}: no ResNet in layout {layout.name}. {_say(resnets, resnets)}")


def _say(resnets: list[Found], offered: Iterable[Found]) -> str:
    """The prefixes that can be given, each of which is one ResNet's."""
    prefixes = [found.prefix for found in resnets]
    names = [
        found.prefix if found.prefix and prefixes.count(found.prefix) == 1 else found.place
        for found in offered
    ]
    shown = ", ".join(dict.fromkeys(names))
    return f"Say which to take with --prefix (VIRTEX.PREFIX): {shown}"


def _no_resnet(path: str, containers: Mapping[str, Mapping]) -> str:
    if not containers:
        return f"{path}: holds no tensors by name. MODEL.WEIGHTS takes a checkpoint with a ResNet."
    if ipt := find_ipt(containers):
        return (
            f"{path}: no ResNet in it: it is an IPT, which restores images (tasks {ipt['scales']}; "
            f"{ipt['layers']} layers). tools/restore_images.py uses it; MODEL.WEIGHTS takes the "
            "layouts of docs/checkpoints.md."
        )
    place, state = max(containers.items(), key=lambda item: len(item[1]))
    first = ", ".join(list(state)[:3])
    what = "It looks like a vision transformer; " if any("blocks." in n for n in state) else ""
    return (
        f"{path}: no ResNet found among the {len(state)} tensors of {place or 'the top level'}, "
        f"which begin with {first}. {what}MODEL.WEIGHTS takes the layouts of docs/checkpoints.md."
    )
