"""What a checkpoint says of its network beside the weights, and whether that fits them.

Projects write down how they trained: an `arch`, command-line arguments, a config as text or dicts,
mean and standard deviation as buffers. What is heard is compared with what the tensors are and with
itself; what nobody says remains an assumption (`layouts.Layout.preprocessing`).
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from virtex_d2.checkpoint.layouts import unwrapped
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.engine.backbone_file import IMAGENET_RGB, MEAN, ORDER, STD, STRIDE
from virtex_d2.engine.unpickling import Placeholder

PIXELS = (ORDER, MEAN, STD, STRIDE)
# What is looked at: the largest configs have some thousand values and are ten levels deep.
_MOST_NODES, _DEEPEST, _LONGEST_LIST, _LONGEST_TEXT = 50_000, 16, 64, 1 << 18
_OTHER = "another network"  # the key of what no plain ResNet is

# Names of settings, and the config keys whose value they are.
_SETTINGS = {
    **dict.fromkeys(("STRIDE_IN_1X1", "stride_in_1x1", "downsample_in_bottleneck"), STRIDE),
    **dict.fromkeys(("FORMAT", "channel_order", "input_format", "color_space"), ORDER),
}
_KNOWN = {ORDER: {"rgb": "RGB", "bgr": "BGR"}, STRIDE: {"true": True, "false": False}}
# Beside a mean: what the name of a setting that is True, and one that is False, say of the order.
# OpenMMLab's programs read images as BGR.
_ORDERS = {
    "to_rgb": ("RGB", "BGR"),
    "bgr_to_rgb": ("RGB", "BGR"),
    "rgb_to_bgr": ("BGR", None),
    "bgr": ("BGR", None),
}
_PAIRS = {
    "mean": "std",
    **{f"{p}_mean": f"{p}_std" for p in ("pixel", "image", "img", "new", "norm", "normalize")},
    "PIXEL_MEAN": "PIXEL_STD",
}
_ARCHITECTURES = {
    *("arch", "architecture", "model_arch", "backbone", "backbone_name", "base_model", "model"),
    *("model_name", "encoder", "encoder_name", "base_encoder", "network", "net", "cnn"),
}
# Of OpenMMLab's `backbone=dict(...)` and detectron2's MODEL.RESNETS.
_OF_BACKBONES = {
    **dict.fromkeys(("depth", "DEPTH"), "depth"),
    **dict.fromkeys(("groups", "NUM_GROUPS"), "groups"),
    **dict.fromkeys(("base_width", "WIDTH_PER_GROUP"), "group_width"),
}
# Settings that change what is computed and no tensor: the values of a plain ResNet.
_PLAIN = {"output_stride": (None, 32), "bn_eps": (None, 1e-5), "maxpool1": (True,)}
_TEXTS = re.compile(r"config|cfg|config_text|yaml", re.IGNORECASE)
_OF_OTHERS = re.compile(r"teacher|distill|(^|_)ema|momentum|target|optim|schedul", re.IGNORECASE)
# "wide_", "tv_", "se" or nothing; ResNet, ResNeXt or ResNeSt; "blur"; the depth; all else.
_NAME = re.compile(r"(\w*?)resne([xst])(t?)_?((?:v2|[a-z])*)_?(\d+)(\w*)")
_OTHER_BEFORE = re.compile(r".*(preact|pre_act|ibn)|.*[a-z0-9]$(?<!wide)")
_OTHER_BEHIND = re.compile(r"[a-z](_|$)|_?v1[a-z]*[cdest](_|$)|.*_(ibn|clip|gn|dilated|os\d+)(_|$)")


@dataclass(frozen=True)
class Statement:
    """One thing that a file says."""

    key: str  # a config key of `PIXELS`, an attribute of `ResNet` or `_OTHER`
    value: Any
    place: str  # where it stands
    found: Any = None  # as what
    inferred: bool = False  # counts where nobody says it
    assumed: bool = False  # in the file that this one was converted from

    def __str__(self) -> str:
        return f"{self.place} says {self.value if self.found is None else repr(self.found)}"


def hear(
    content: Any, metadata: Mapping[str, str], states: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[Statement]:
    """All that a file says of the networks in it.

    Args:
        content, metadata: of a `StoredCheckpoint`.
        states: its state dicts by place.
    """
    heard: list[Statement] = []
    for place, node in _nodes({**(content if isinstance(content, Mapping) else {}), **metadata}):
        assumed = str(node.get("assumed", "")).split(",")
        heard += [replace(s, assumed=s.key in assumed) for s in _of_settings(place, node)]
    for state in states.values():
        buffers = {
            plain: [round(value, 4) for value in state[name].flatten().tolist()]
            for plain, name in unwrapped(state).items()
            if plain.rpartition(".")[2] in {*_PAIRS, *_PAIRS.values()} and state[name].numel() == 3
        }
        for name, value in buffers.items():
            before, dot, last = name.rpartition(".")
            if last in _PAIRS:
                std = buffers.get(f"{before}{dot}{_PAIRS[last]}")
                heard += _of_mean(name, last, value, std, "buffer")
    return heard


def weigh(
    heard: Iterable[Statement], architecture: ResNet | None
) -> tuple[dict[str, Statement], list[str]]:
    """What a file says of pixels and stride, and what contradicts itself or the tensors.

    Args:
        heard: of `hear`.
        architecture: of the tensors; None where only pixels matter.

    Returns:
        What is said by config key, and a sentence about each contradiction.
    """
    by_key: dict[str, list[Statement]] = {}
    for statement in heard:
        by_key.setdefault(statement.key, []).append(statement)
    said, doubts = {}, []
    for key, statements in by_key.items():
        statements = [s for s in statements if not s.inferred] or statements
        first = statements[0]
        if key in PIXELS:
            said[key] = first
            other = [s for s in statements if not same(first.value, s.value)]
            if other:
                doubts.append(f"it says two things of {key}: {first}, {other[0]}")
        elif architecture is None:
            continue
        elif key == _OTHER:
            doubts.append(
                f"{first}, which is {first.value}, with the tensors of a {architecture.name}"
            )
        elif all(s.value != getattr(architecture, key) for s in statements):
            doubts.append(f"{first}, but its tensors are those of a {architecture.name}")
    deep = architecture is not None and architecture.bottleneck
    if deep and STRIDE not in said and STD in said and same(said[STD].value, [1.0] * 3):
        doubts.append(
            f"{said[STD]}, as Caffe's networks have it, and nobody whether the stride is in the "
            "1x1 convolutions, as in theirs, or in the 3x3 ones"
        )
    return said, list(dict.fromkeys(doubts))


def same(expected: object, found: object) -> bool:
    """Whether two values of a config key are the same, numbers to a thousandth."""
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(found) and all(
            abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in zip(expected, found)
        )
    return expected == found


def _nodes(content: Mapping) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict or object of settings with its dotted place, the outer ones first."""
    queue: deque[tuple[str, Any, int]] = deque([("", content, 0)])
    left = _MOST_NODES
    while queue and left > 0:
        place, node, depth = queue.popleft()
        left -= 1
        if isinstance(node, str):
            node = _read_config(node[:_LONGEST_TEXT])
            place += ":"
        if isinstance(node, (list, tuple)) and len(node) <= _LONGEST_LIST:
            node = {str(number): item for number, item in enumerate(node)}
        elif isinstance(node, Placeholder):
            node = node.values
        if not isinstance(node, Mapping) or depth > _DEEPEST:
            continue
        node = {key: _value(item) for key, item in node.items() if isinstance(key, str)}
        yield place, node
        for key, item in node.items():
            below = _at(place, key).removesuffix("._content")  # of OmegaConf
            is_text = isinstance(item, str) and _TEXTS.fullmatch(key)
            nested = is_text or isinstance(item, (Mapping, list, tuple, Placeholder))
            if nested and not _OF_OTHERS.search(key):
                queue.append((below, item, depth + 1))


def _value(item: Any) -> Any:
    """OmegaConf's wrapped values are taken out."""
    return item.values["_val"] if isinstance(item, Placeholder) and "_val" in item.values else item


_TOKEN = re.compile(
    r"#[^\n]*|(\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|[A-Za-z_][\w.]*"
    r"|[-+]?\.?\d[\w.]*(?:(?<=e)[-+]\d+)?|[^\s\w])"
)
_WORDS = {"True": True, "true": True, "False": False, "false": False}


def _read_config(text: str) -> Any:
    """The literals of a config's text: Python's `a = dict(b=[1, 2])`, or JSON.

    What is no literal is None. Nothing is run, and nothing compiled: a text that is made to be
    costly costs no more than its length.
    """
    tokens = [token for token in _TOKEN.findall(text) if token][::-1]

    def inside(depth: int) -> dict[str, Any] | list:
        named: dict[str, Any] = {}
        items: list = []
        while tokens and (depth == 0 or tokens[-1] not in ")]}"):
            if len(tokens) > 2 and tokens[-2] in "=:":
                name, _ = tokens.pop(), tokens.pop()
                named[name.strip("'\"")] = value(depth)
            elif tokens[-1] == ",":
                tokens.pop()
            else:
                items.append(value(depth))
        tokens[-1:] = []
        return named or items

    def value(depth: int) -> Any:
        token = tokens.pop()
        if token in "[({" or tokens[-1:] == ["("]:
            tokens[-1:] = tokens[-1:] if token in "[({" else []
            if depth > _DEEPEST:
                tokens.clear()
            found = inside(depth + 1)
        elif token[0] in "'\"":
            found = token[1:-1]
        else:
            found = _WORDS[token] if token in _WORDS else _number(token)
        return None if tokens and tokens[-1] in "+-*/%|&[(." else found

    return inside(0)


def _number(token: str) -> int | float | None:
    try:
        return int(token) if token.lstrip("+-").isdecimal() else float(token)
    except ValueError:
        return None


def _at(place: str, name: str) -> str:
    return f"{place} {name}" if place.endswith(":") else f"{place}.{name}".lstrip(".")


def _of_settings(place: str, node: Mapping[str, Any]) -> Iterator[Statement]:
    of_backbone = re.search(r"(^|[. ])(backbone|RESNETS)$", place)
    for name, value in node.items():
        at = _at(place, name)
        if name in _PAIRS:
            yield from _of_mean(at, name, value, node.get(_PAIRS[name]), place)
            for flag, orders in _ORDERS.items():
                order = orders[not node[flag]] if isinstance(node.get(flag), bool) else None
                if order and _three(value):
                    yield Statement(ORDER, order, _at(place, flag), node[flag])
        elif name in _SETTINGS:
            known = _KNOWN[_SETTINGS[name]].get(str(value).lower())
            if known is not None:
                yield Statement(_SETTINGS[name], known, at)
        elif name in _ARCHITECTURES and isinstance(value, str):
            yield from _of_name(at, value)
        elif name in _PLAIN and value not in _PLAIN[name]:
            yield Statement(_OTHER, "no plain ResNet's", at, value)
        elif of_backbone and name in _OF_BACKBONES and type(value) is int:
            yield Statement(_OF_BACKBONES[name], value, at)
        elif of_backbone and name == "style" and value in ("caffe", "pytorch"):
            yield Statement(STRIDE, value == "caffe", at, value)


def _of_mean(place: str, name: str, mean: Any, std: Any, where: str) -> Iterator[Statement]:
    """Mean and standard deviation on the scale 0 to 255; the order, where ImageNet's mean tells it.

    A mean of at most 1 is on the scale 0 to 1, but for detectron2's pixel_mean; where it is 0, so
    is everything in the words of timm's and torchvision's programs.
    """
    means, stds = _three(mean), _three(std)
    if not means or not stds or min(stds) <= 0:
        return
    of_mm = where.startswith("meta") or ":" in where or where == "buffer"
    small = max(map(abs, means)) <= 1 and (any(means) or (max(stds) <= 1 and not of_mm))
    if small and "pixel" not in name.lower():
        means, stds = ([255.0 * value for value in values] for values in (means, stds))
    yield Statement(MEAN, means, place)
    yield Statement(STD, stds, place.replace("mean", "std").replace("MEAN", "STD"))
    for order, usual in (("RGB", IMAGENET_RGB.mean), ("BGR", IMAGENET_RGB.mean[::-1])):
        if all(abs(a - b) < 3 for a, b in zip(means, usual)):
            yield Statement(ORDER, order, f"{place}, ImageNet's in this order,", inferred=True)


def _three(value: Any) -> list[float]:
    """Three finite numbers, also as text with commas; [] where it is something else."""
    if isinstance(value, str):
        value = value.strip("()[] ").split(",")
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return []
    try:
        numbers = [float(item) for item in map(_value, value) if not isinstance(item, bool)]
    except (TypeError, ValueError):
        return []
    return numbers if len(numbers) == 3 and all(map(math.isfinite, numbers)) else []


def _of_name(place: str, text: str) -> Iterator[Statement]:
    """What the name of an architecture says: resnet18, wide_resnet50_2, resnetblur50, ..."""
    name = text.lower().rsplit("/", 1)[-1].removeprefix("torchvision.models.").split(".")[0]
    match = _NAME.fullmatch(name.replace("-", "_"))
    if not match:
        return
    before, kind, _, inside, depth, behind = match.groups()
    if kind == "s" or inside or _OTHER_BEFORE.match(before) or _OTHER_BEHIND.match(behind):
        yield Statement(_OTHER, "another kind of ResNet", place, text)
        return
    yield Statement("depth", int(depth), place, text)
    cardinality = re.match(r"_(\d+)x(\d+)d", behind)
    factor = re.fullmatch(r"_(\d)", behind)
    if cardinality:
        yield Statement("groups", int(cardinality[1]), place, text)
        yield Statement("group_width", int(cardinality[2]), place, text)
    elif before.rstrip("_").endswith("wide") and factor:
        yield Statement("group_width", 64 * int(factor[1]), place, text)
    elif kind == "t" and not behind:
        yield Statement("groups", 1, place, text)
