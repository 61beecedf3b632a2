"""Networks that restore images (IPT): known by their names, so as to say that they are no ResNet.

What loads them is `pretrain/methods/ipt`, which this package knows nothing of.
"""

import math
import re
from collections.abc import Mapping

import torch

# In every checkpoint of IPT (arXiv 2012.00364), released or of a run here.
_ANCHORS = (
    "head.0.0.weight",
    "body.encoder.layers.0.self_attn.in_proj_weight",
    "body.decoder.layers.0.multihead_attn.in_proj_weight",
    "tail.0.1.weight",
)
_BEFORE = re.compile(r"^(module\.)?(network\.)?")
_TOKEN = 3  # side of a token, in pixels of a patch

States = Mapping[str, Mapping[str, torch.Tensor]]


def find_ipt(states: States) -> dict[str, object] | None:
    """What an IPT among the state dicts of a file is made of; None where there is none.

    Returns:
        "place" (of its state dict), "tensors" (how many), "scales" (of its
        tasks, "x2, x1"), "features", "layers" (of encoder and decoder) and, where the file has
        positions, "patch" (side in pixels).
    """
    for place, state in states.items():
        shapes = {_BEFORE.sub("", name): tensor.shape for name, tensor in state.items()}
        if not all(name in shapes for name in _ANCHORS):
            continue
        features = shapes["head.0.0.weight"][0]
        found = {
            "place": place or "top level",
            "tensors": len(shapes),
            "scales": ", ".join(f"x{scale}" for scale in _scales(shapes, features)),
            "features": features,
            "layers": " + ".join(
                str(_count(shapes, rf"body\.{part}\.layers\.(\d+)\."))
                for part in ("encoder", "decoder")
            ),
        }
        if positions := shapes.get("body.position_encoding.pe.weight"):
            found["patch"] = math.isqrt(positions[0]) * _TOKEN
        return found
    return None


def _scales(shapes: Mapping[str, torch.Size], features: int) -> list[int]:
    """How much larger each task's output is: 9 or 4 times the channels before each shuffle."""
    scales = []
    for task in range(_count(shapes, r"head\.(\d+)\.")):
        steps = [
            shape[0] // features
            for name, shape in shapes.items()
            if re.fullmatch(rf"tail\.{task}\.0\.\d+\.weight", name)
        ]
        scales.append(math.isqrt(math.prod(steps)))
    return scales


def _count(shapes: Mapping[str, torch.Size], pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})
