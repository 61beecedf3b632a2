"""How projects name the tensors of one and the same ResNet.

A naming is a table from roles to names. Names are translated from any naming to any other by role,
so that a new one is a new table and no new code.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

# What each kind of module holds. Batch counters (`num_batches_tracked`) are not of the backbone:
# with a fixed momentum nothing reads them.
CONVOLUTION = ("weight",)
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Naming:
    """How one project names a ResNet's tensors.

    Attributes:
        name: of the naming.
        first_stage: the number of the stage behind the stem.
        modules: role -> module name, with the fields {stage}, {block} and {n} (a convolution of
            its block, counted by `numbers`).
        convolution, norm: parameter -> what follows the module's name.
        numbers: the convolutions of a block in order.
        also: further (role, module name) that are read, and not written.
    """

    name: str
    first_stage: int
    modules: dict[str, str]
    convolution: dict[str, str]
    norm: dict[str, str]
    numbers: str = "123"
    also: tuple[tuple[str, str], ...] = ()

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
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS |= {"_forward_module"}

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
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names
    }
    return plain if len(plain) == len(names) else {name: name for name in names}


def is_counter(name: str) -> bool:
    """Whether it is a norm's `num_batches_tracked`."""
    return name.endswith("num_batches_tracked")


def looks_like_backbone(name: str) -> bool:
    """Whether a name without its prefix is one of a ResNet's inside, rather than of a head."""
    return _OF_A_RESNET.match(name) is not None
