"""Whose checkpoint is this, and how it names the tensors of its ResNet: tables.

A naming is a table from roles to names, so that names are translated from any naming to any other.
A layout is recognised by the keys in the file, never by the file's name. To add one: an entry in
`LAYOUTS`, and a fixture in tests/checkpoint/layout_files.py.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from virtex_d2.engine.backbone_file import IMAGENET_RGB, Preprocessing

# What each kind of module holds. Batch counters (`num_batches_tracked`) are not of the backbone:
# with a fixed momentum nothing reads them.
CONVOLUTION = ("weight",)
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Naming:
    """How one project names a ResNet's tensors."""

    name: str
    first_stage: int  # the number of the stage behind the stem
    modules: dict[str, str]  # by role, with the fields {stage}, {block} and {n}, a convolution
    convolution: dict[str, str]  # parameter -> what follows the module's name
    norm: dict[str, str]
    numbers: str = "123"  # of the convolutions of a block in order
    also: tuple[tuple[str, str], ...] = ()  # further (role, module) that are read, not written

    def parameters(self, role: str) -> dict[str, str]:
        """Parameter -> suffix of a role's module."""
        return self.norm if role.endswith("norm") else self.convolution

    @functools.cached_property
    def patterns(self) -> list[tuple[str, str, re.Pattern]]:
        """Role, parameter and regular expression of each name, the fields as named groups."""
        fields = {"stage": r"\d+", "block": r"\d+", "n": f"[{self.numbers}]"}
        return [
            (
                role,
                parameter,
                re.compile(
                    re.sub(
                        r"\\{(\w+)\\}",
                        lambda match: f"(?P<{match[1]}>{fields[match[1]]})",
                        re.escape(module + suffix),
                    )
                ),
            )
            for role, module in (*self.modules.items(), *self.also)
            for parameter, suffix in self.parameters(role).items()
        ]


def _dotted(names: Iterable[str]) -> dict[str, str]:
    return {name: f".{name}" for name in names}


TORCHVISION = Naming(
    "torchvision",
    first_stage=1,
    modules={
        "stem convolution": "conv1",
        "stem norm": "bn1",
        "convolution": "layer{stage}.{block}.conv{n}",
        "norm": "layer{stage}.{block}.bn{n}",
        "shortcut convolution": "layer{stage}.{block}.downsample.0",
        "shortcut norm": "layer{stage}.{block}.downsample.1",
    },
    convolution=_dotted(CONVOLUTION),
    norm=_dotted(NORM),
    also=(
        ("stem convolution", "layer0.0"),
        ("stem norm", "layer0.1"),
        ("stem convolution", "layer0.conv1"),
        ("stem norm", "layer0.bn1"),
        ("shortcut convolution", "layer{stage}.{block}.shortcut.0"),
        ("shortcut norm", "layer{stage}.{block}.shortcut.1"),
    ),
)


def _numbered(name: str, first_stage: int, stem: str, norm: str) -> Naming:
    """torchvision's blocks in nn.Sequential, which counts its parts."""
    modules = {
        role: module.replace("layer{stage}", "{stage}")
        for role, module in TORCHVISION.modules.items()
    }
    modules |= {"stem convolution": stem, "stem norm": norm}
    return Naming(name, first_stage, modules, TORCHVISION.convolution, TORCHVISION.norm)


# nn.Sequential(*resnet.children()), and one whose first part is the stem (convolution, norm, ReLU
# and pooling).
SEQUENTIAL = _numbered("sequential", 4, "0", "1")
SEQUENTIAL_STEM = _numbered("sequential-stem", 1, "0.0", "0.1")

TRANSFORMERS = Naming(
    "transformers",
    first_stage=0,
    modules={
        "stem convolution": "embedder.embedder.convolution",
        "stem norm": "embedder.embedder.normalization",
        "convolution": "encoder.stages.{stage}.layers.{block}.layer.{n}.convolution",
        "norm": "encoder.stages.{stage}.layers.{block}.layer.{n}.normalization",
        "shortcut convolution": "encoder.stages.{stage}.layers.{block}.shortcut.convolution",
        "shortcut norm": "encoder.stages.{stage}.layers.{block}.shortcut.normalization",
    },
    convolution=_dotted(CONVOLUTION),
    norm=_dotted(NORM),
    numbers="012",
)

DETECTRON2 = Naming(
    "detectron2",
    first_stage=2,
    modules={
        "stem convolution": "stem.conv1",
        "stem norm": "stem.conv1.norm",
        "convolution": "res{stage}.{block}.conv{n}",
        "norm": "res{stage}.{block}.conv{n}.norm",
        "shortcut convolution": "res{stage}.{block}.shortcut",
        "shortcut norm": "res{stage}.{block}.shortcut.norm",
    },
    convolution=_dotted(CONVOLUTION),
    norm=_dotted(NORM),
)

# Statistics are folded into its norms' affine parameters: it has no running ones.
CAFFE2 = Naming(
    "caffe2",
    first_stage=2,
    modules={
        "stem convolution": "conv1",
        "stem norm": "res_conv1",
        "convolution": "res{stage}_{block}_branch2{n}",
        "norm": "res{stage}_{block}_branch2{n}",
        "shortcut convolution": "res{stage}_{block}_branch1",
        "shortcut norm": "res{stage}_{block}_branch1",
    },
    convolution={"weight": "_w"},
    norm={"weight": "_bn_s", "bias": "_bn_b"},
    numbers="abc",
)

NAMINGS = (TORCHVISION, DETECTRON2, CAFFE2, TRANSFORMERS, SEQUENTIAL, SEQUENTIAL_STEM)

# What wrappers put into names, at any depth: DDP and DataParallel, torch.compile, FSDP, activation
# checkpointing, DeepSpeed.
_WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPED |= {"_forward_module"}

# Names that only a ResNet-like network has. One of them that is not in the tables belongs to
# another architecture (a deep stem, squeeze and excitation, a convolution with a bias).
_OF_A_RESNET = re.compile(
    r"(stem\.|conv\d|bn\d|norm\d|layer\d|res\d|res_conv|attnpool|transformer|blocks?\.|embedder\.|"
    r"encoder\.stages\.|[0-7]\.(\d+\.|bias$))"
)


def translate(name: str, source: Naming, target: Naming) -> str | None:
    """A tensor's name in another naming; None where one of the two has no such tensor.

    >>> translate("layer1.0.bn3.running_var", TORCHVISION, DETECTRON2)
    'res2.0.conv3.norm.running_var'
    """
    for role, parameter, pattern in source.patterns:
        match = pattern.fullmatch(name)
        if match:
            fields = match.groupdict()
            if "stage" in fields:
                stage = int(fields["stage"]) - source.first_stage
                if stage < 0:
                    return None
                fields["stage"] = stage + target.first_stage
            if "n" in fields:
                fields["n"] = target.numbers[source.numbers.index(fields["n"])]
            suffix = target.parameters(role).get(parameter)
            return None if suffix is None else target.modules[role].format(**fields) + suffix
    return None


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put into them -> the names as they are.

    Where two names would become one, all stay as they are: the file holds wrapped and unwrapped
    networks.
    """
    names = list(names)
    plain = {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): name for name in names
    }
    return plain if len(plain) == len(names) else {name: name for name in names}


def is_counter(name: str) -> bool:
    """Whether it is a norm's `num_batches_tracked`."""
    return name.endswith("num_batches_tracked")


def looks_like_backbone(name: str) -> bool:
    """Whether a name without its prefix is one of a ResNet's inside, rather than of a head."""
    return _OF_A_RESNET.match(name) is not None


# --- layouts

# MSRA's, as in detectron2's model zoo.
MSRA_BGR = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)


@dataclass(frozen=True)
class Copy:
    """One of the networks that a training checkpoint holds, with regular expressions."""

    name: str  # for `--copy` and VIRTEX.COPY
    prefix: str  # before the ResNet's names, without the wrappers of DDP, torch.compile and so on
    container: str = r"(?!.*ema).*"  # the path of dict keys to the state dict, joined by "/"


@dataclass(frozen=True)
class Layout:
    """One project's files."""

    name: str  # for `--layout` and VIRTEX.LAYOUT
    projects: str  # whose files look so
    copies: tuple[Copy, ...]  # that may be in a file; the first is the one that is taken
    naming: Naming = TORCHVISION  # of the ResNet behind the prefix
    # Regular expressions: one must begin a name beside the ResNet's. Without any the prefix is
    # enough.
    markers: tuple[str, ...] = ()
    # Assumed where the file itself says nothing; None where there is no such custom.
    preprocessing: Preprocessing | None = IMAGENET_RGB
    refusal: str = ""  # why this cannot be loaded, where it cannot
    detector: bool = False  # a whole one, which is loaded as detectron2 does


_EMA = r"(.*/)?[^/]*ema[^/]*(/.*)?"

# What `convert` writes, and how the names of such files end.
SUFFIXES = {
    "backbone": (".safetensors",),
    "detectron2": (".pkl",),
    "torchvision": (".pth", ".safetensors"),
    "timm": (".pth", ".safetensors"),
}

LAYOUTS = (
    Layout(
        "virtex",
        "VirTex and VirTex-D2 pretraining checkpoints",
        (Copy("visual", r"visual\.cnn\."),),
    ),
    Layout(
        "torchvision",
        "torchvision, timm, VirTex's hub model, and the released ResNets of DINO, Barlow Twins, "
        "VICReg and others, which use its names",
        (Copy("model", ""), Copy("ema", "", _EMA)),
    ),
    Layout(
        "moco",
        "MoCo v1 and v2",
        (Copy("query", r"encoder_q\."), Copy("momentum", r"encoder_k\.")),
    ),
    Layout(
        "moco-v3",
        "MoCo v3",
        (Copy("base", r"base_encoder\."), Copy("momentum", r"momentum_encoder\.")),
    ),
    Layout(
        "swav",
        "SwAV and DeepCluster v2",
        (Copy("model", ""),),
        markers=(r"projection_head\.", r"prototypes\."),
    ),
    Layout(
        "dino",
        "DINO training checkpoints",
        (
            Copy("teacher", r"backbone\.", r"(.*/)?teacher(/.*)?"),
            Copy("student", r"backbone\.", r"(.*/)?student(/.*)?"),
        ),
    ),
    Layout(
        "backbone",
        "Barlow Twins, VICReg and VICRegL training, DenseCL, mmselfsup, SimCLR: `backbone.*`",
        (Copy("backbone", r"backbone\.", r"(?!(.*/)?(teacher|student)(/|$))(?!.*ema).*"),),
    ),
    Layout(
        "simsiam",
        "SimSiam",
        (Copy("encoder", r"encoder\."),),
        markers=(r"predictor\.", r"encoder\.fc\."),
    ),
    Layout(
        "pixpro",
        "PixPro",
        (Copy("encoder", r"encoder\."), Copy("momentum", r"encoder_k\.")),
        markers=(r"projector\.", r"projector_k\."),
    ),
    Layout(
        "byol",
        "BYOL",
        (
            Copy("online", r"online_(encoder|network)\.(net\.|encoder\.)?"),
            Copy("target", r"target_(encoder|network)\.(net\.|encoder\.)?"),
        ),
    ),
    Layout(
        "transformers",
        "ResNets of Hugging Face's transformers",
        (Copy("model", r"(resnet\.)?"),),
        naming=TRANSFORMERS,
    ),
    Layout(
        "sequential",
        "torchvision's ResNets in nn.Sequential, by number: lightly, fastai, many a script",
        (Copy("backbone", r"(backbone\.|0\.)?"), Copy("momentum", r"backbone_momentum\.")),
        naming=SEQUENTIAL,
    ),
    Layout(
        "sequential-stem",
        "the same with a stem that is a Sequential of its own",
        (Copy("backbone", r"(backbone\.)?"),),
        naming=SEQUENTIAL_STEM,
    ),
    Layout(
        "clip",
        "CLIP and its kin",
        (Copy("visual", r"(model\.)?visual\.(trunk\.)?"),),
        refusal="it is a CLIP image encoder: three stem convolutions, average pooling before the "
        "strided convolutions and an attention pool, another architecture than detectron2's ResNet",
    ),
    Layout(
        "detectron2",
        "detectron2's backbones alone",
        (Copy("backbone", r"(bottom_up\.)?"),),
        naming=DETECTRON2,
        preprocessing=None,
    ),
    Layout(
        "detectron2-detector",
        "whole detectors of detectron2",
        (
            Copy("detector", r"backbone\.(bottom_up\.)?"),
            Copy("ema", r"backbone\.(bottom_up\.)?", _EMA),
        ),
        naming=DETECTRON2,
        preprocessing=None,
        detector=True,
    ),
    Layout(
        "msra",
        "Caffe2 and MSRA ResNets of detectron2's and Detectron's model zoos",
        (Copy("model", ""),),
        naming=CAFFE2,
        preprocessing=MSRA_BGR,
    ),
)

# Wrappers that are left before names where a file has networks with and without one.
_WRAPPERS = r"(?:module\.|_orig_mod\.)*"
# The names by which a ResNet of each naming is found, whatever stands before them. Numbers are in
# many networks: there the stem must be beside them.
_ANCHORS = {
    "torchvision": ("layer1.0.conv1.weight",),
    "detectron2": ("res2.0.conv1.weight",),
    "caffe2": ("res2_0_branch2a_w",),
    "transformers": ("encoder.stages.0.layers.0.layer.0.convolution.weight",),
    "sequential": ("4.0.conv1.weight", "0.weight"),
    "sequential-stem": ("1.0.conv1.weight", "0.0.weight"),
}


@dataclass(frozen=True)
class Found:
    """A ResNet in a file, and what it may be."""

    container: str  # path of dict keys to its state dict, joined by "/"
    prefix: str  # before its names, without wrappers
    naming: Naming
    layouts: tuple[tuple[Layout, Copy], ...]  # that fit, the more specific ones only

    @property
    def place(self) -> str:
        """Where it is, for messages and --prefix: "state_dict/encoder_q."; "/" is all of a file."""
        return f"{self.container}/{self.prefix}" if self.container else self.prefix or "/"


def find_resnets(containers: dict[str, Sequence[str]]) -> list[Found]:
    """Every ResNet among the names of a file's state dicts, and the layouts that fit each.

    Args:
        containers: path -> the names in that state dict.
    """
    found = []
    for container, names in containers.items():
        present = set(unwrapped(names))
        for naming in NAMINGS:
            anchors = _ANCHORS[naming.name]
            prefixes = {n.removesuffix(anchors[0]) for n in present if n.endswith(anchors[0])}
            for prefix in sorted(prefixes):
                whole_words = not prefix or prefix.endswith(".")
                if not whole_words or not all(prefix + anchor in present for anchor in anchors):
                    continue
                fits = _fitting(container, prefix, naming, present)
                found.append(Found(container, prefix, naming, tuple(fits)))
    return found


def _fitting(
    container: str, prefix: str, naming: Naming, names: set[str]
) -> list[tuple[Layout, Copy]]:
    fits = [
        (layout, copy)
        for layout in LAYOUTS
        if layout.naming is naming
        for copy in layout.copies
        if re.fullmatch(_WRAPPERS + copy.prefix, prefix)
        and re.fullmatch(copy.container, container)
        and (not layout.markers or _marked(layout, names))
    ]
    # A layout that is told by more than its prefix is the more specific one.
    specific = [(layout, copy) for layout, copy in fits if layout.markers]
    return specific or fits


def _marked(layout: Layout, names: set[str]) -> bool:
    pattern = re.compile(_WRAPPERS + f"(?:{'|'.join(layout.markers)})")
    return any(pattern.match(name) for name in names)
