"""Whose checkpoint is this: how projects name the tensors of one and the same ResNet.

A layout is a table from roles to module names. Names are translated from any layout to any other by
role, so that a new one is a new table and no new code.
"""

import functools
import re
from dataclasses import dataclass

# Of convolutions and norms alike. Batch counters (`num_batches_tracked`) are not of the backbone:
# with a fixed momentum nothing reads them.
PARAMETERS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """How one project names a ResNet's modules.

    Attributes:
        name: of the layout.
        first_stage: the number of the stage behind the stem.
        modules: role -> module name, with the fields {stage}, {block} and {n} (the number of a
            convolution in its block, from 1).
    """

    name: str
    first_stage: int
    modules: dict[str, str]

    @functools.cached_property
    def patterns(self) -> list[tuple[str, re.Pattern]]:
        """Role and regular expression of each module, the fields as named groups."""
        return [
            (role, re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template))))
            for role, template in self.modules.items()
        ]


TORCHVISION = Layout(
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
)

DETECTRON2 = Layout(
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
)


def translate(name: str, source: Layout, target: Layout) -> str | None:
    """A tensor's name in another layout; None where `source` has no such tensor.

    >>> translate("layer1.0.bn3.running_var", TORCHVISION, DETECTRON2)
    'res2.0.conv3.norm.running_var'
    """
    module, _, parameter = name.rpartition(".")
    if parameter not in PARAMETERS:
        return None
    for role, pattern in source.patterns:
        match = pattern.fullmatch(module)
        if match:
            fields = match.groupdict()
            if "stage" in fields:
                stage = int(fields["stage"]) - source.first_stage
                if stage < 0:
                    return None
                fields["stage"] = stage + target.first_stage
            return f"{target.modules[role].format(**fields)}.{parameter}"
    return None
