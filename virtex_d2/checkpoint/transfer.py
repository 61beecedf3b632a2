"""Load a backbone file into a detector so that every backbone tensor is set, or not at all."""

import logging
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from torch import nn

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_safetensors, sha256

from .layouts import to_detectron2

logger = logging.getLogger(__name__)

FORMAT = "virtex_d2.backbone"

# Where detectors keep their ResNet: FPN, C4 and DC5 backbones, and res5 of C4's ROI heads.
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.", "roi_heads.")
_STAGES = ("stem.", "res2.", "res3.", "res4.", "res5.")
# The extra norm behind res5 belongs to the detector: no backbone has it.
_DETECTORS_OWN = ("res5.norm.",)


@dataclass
class TransferReport:
    """What a load did, by detector tensor name.

    Attributes:
        source: the file, and `sha256` of its bytes.
        loaded: tensors that were set.
        new: tensors of the detector that no backbone has (FPN, RPN, heads).
        metadata: the file's.
    """

    source: str
    sha256: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def is_backbone_file(path: str) -> bool:
    """Whether MODEL.WEIGHTS names a backbone file rather than a detector's checkpoint."""
    return path.endswith(".safetensors")


def load_backbone(model: nn.Module, path: str, cfg: CfgNode) -> TransferReport:
    """Set every backbone tensor of a detector from a backbone file, running statistics included.

    Args:
        model: a detectron2 detector (FPN, C4 or DC5), possibly in DistributedDataParallel.
        path: a file that `pretrain` exported.
        cfg: the detector's config; it must treat pixels as the backbone's training did.

    Raises:
        InputError: the file is no backbone file, the preprocessing differs, a tensor is missing,
            left over, of another shape, or not finite. Nothing is loaded then.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected a backbone file (format {FORMAT}), found format "
            f"{metadata.get('format', 'none')!r}. tools/pretrain_net.py writes one as "
            "OUTPUT_DIR/backbone.safetensors."
        )
    check_preprocessing(path, metadata, cfg)
    model = getattr(model, "module", model)
    wanted = backbone_names(model)
    state = model.state_dict()
    given = {to_detectron2(name) or name: tensor for name, tensor in tensors.items()}

    problems = [f"{name} is missing in the file" for name in wanted if name not in given]
    problems += [f"{name} of the file has no place" for name in given if name not in wanted]
    for name in wanted.keys() & given.keys():
        found, expected = tuple(given[name].shape), tuple(state[wanted[name]].shape)
        if found != expected:
            problems.append(f"{name} has shape {found}, the detector wants {expected}")
        elif not torch.isfinite(given[name]).all():
            problems.append(f"{name} holds NaN or Inf")
    if problems:
        raise InputError(
            f"{path} ({metadata.get('architecture')}) does not fit this detector "
            f"(MODEL.RESNETS.DEPTH {cfg.MODEL.RESNETS.DEPTH}, NORM {cfg.MODEL.RESNETS.NORM}): "
            f"{len(problems)} problems, nothing was loaded: {'; '.join(sorted(problems)[:6])}."
        )

    with torch.no_grad():
        for name, target in wanted.items():
            state[target].copy_(given[name])
    loaded = sorted(wanted.values())
    new = sorted(name for name in state if name not in set(loaded) and not _is_counter(name))
    report = TransferReport(path, sha256(path), loaded, new, metadata)
    logger.info(
        "%s: %d of %d backbone tensors set (%s, %s, iteration %s, sha256 %s); %d tensors of the "
        "detector start at random: %s",
        path,
        len(loaded),
        len(wanted),
        metadata.get("architecture"),
        metadata.get("source"),
        metadata.get("iteration"),
        report.sha256[:12],
        len(new),
        ", ".join(sorted({".".join(name.split(".")[:2]) for name in new})),
    )
    return report


def backbone_names(model: nn.Module) -> dict[str, str]:
    """Every backbone tensor of a detector: `res2.0.conv1.weight` -> its full name."""
    names = {}
    for full_name in model.state_dict():
        for prefix in BACKBONE_PREFIXES:
            name = full_name.removeprefix(prefix)
            if name == full_name or not name.startswith(_STAGES):
                continue
            if not _is_counter(name) and not name.startswith(_DETECTORS_OWN):
                names[name] = full_name
            break
    return names


def check_preprocessing(path: str, metadata: dict[str, str], cfg: CfgNode) -> None:
    """Compare what the backbone was trained on with what the detector will feed it.

    Raises:
        InputError: they differ; the message holds the YAML to use.
    """
    expected = {
        "INPUT.FORMAT": metadata["channel_order"],
        "MODEL.PIXEL_MEAN": [float(value) for value in metadata["pixel_mean"].split(",")],
        "MODEL.PIXEL_STD": [float(value) for value in metadata["pixel_std"].split(",")],
        "MODEL.RESNETS.STRIDE_IN_1X1": metadata["stride_in_1x1"] == "true",
    }
    found = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        "MODEL.RESNETS.STRIDE_IN_1X1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
    }
    wrong = [key for key in expected if not _same(expected[key], found[key])]
    if wrong:
        raise InputError(
            f"{path}: the config feeds this backbone other pixels than it was trained on: "
            + "; ".join(f"{key} is {found[key]}, trained with {expected[key]}" for key in wrong)
            + f". Use:\nINPUT: {{FORMAT: {expected['INPUT.FORMAT']}}}\nMODEL:\n"
            f"  PIXEL_MEAN: {expected['MODEL.PIXEL_MEAN']}\n"
            f"  PIXEL_STD: {expected['MODEL.PIXEL_STD']}\n"
            f"  RESNETS: {{STRIDE_IN_1X1: {expected['MODEL.RESNETS.STRIDE_IN_1X1']}}}"
        )


def _same(expected: object, found: object) -> bool:
    if isinstance(expected, list):
        return len(expected) == len(found) and all(
            abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in zip(expected, found)
        )
    return expected == found


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
