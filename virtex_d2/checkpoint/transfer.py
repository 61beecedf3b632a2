"""Load a backbone file into a detector so that every backbone tensor is set, or nothing is."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import yaml
from detectron2.config import CfgNode
from torch import nn

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_safetensors, sha256

from .layouts import DETECTRON2, TORCHVISION, translate

logger = logging.getLogger(__name__)

FORMAT = "virtex_d2.backbone"
FORMAT_VERSION = "1"
METADATA = ("architecture", "channel_order", "pixel_mean", "pixel_std", "stride_in_1x1")

# Where detectors keep their ResNet: FPN; C4 and others without FPN; res5 of C4's ROI heads.
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.", "roi_heads.")

# MODEL.RESNETS.DEPTH by (blocks of res2 to res5, whether they are bottlenecks).
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


@dataclass(frozen=True)
class TransferReport:
    """What a load did.

    Attributes:
        source: the file.
        sha256: of its bytes.
        loaded: the detector's names of the tensors that were set: all of its backbone.
        dropped: the file's tensors of stages that the detector does not have.
        new: the detector's tensors that no backbone has (FPN, RPN, heads).
        metadata: the file's.
    """

    source: str
    sha256: str
    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    metadata: dict[str, str]


def is_backbone_file(path: str) -> bool:
    """Whether MODEL.WEIGHTS names a backbone file rather than a detector's checkpoint."""
    return path.endswith(".safetensors")


def load_backbone(model: nn.Module, path: str, cfg: CfgNode) -> TransferReport:
    """Set every backbone tensor of a detector from a backbone file, running statistics included.

    Frozen stages (FREEZE_AT) get the file's statistics too, res5 of a C4 detector lies in its ROI
    heads. What the file lacks keeps its initialisation: FPN, RPN, heads, C4's extra norm.

    Args:
        model: a detectron2 detector with a ResNet, possibly in DistributedDataParallel.
        path: a file that `tools/pretrain_net.py` wrote.
        cfg: the detector's config; what it does to pixels must be what the backbone was trained
            with, and its ResNet that of the file.

    Raises:
        InputError: the file is no backbone file; config and file contradict each other; a tensor is
            missing, left over, of another shape or not finite. Nothing is set then.
    """
    tensors, metadata = _read(path)
    model = getattr(model, "module", model)
    given = {}
    for name, tensor in tensors.items():
        translated = translate(name, TORCHVISION, DETECTRON2)
        if translated is None:
            raise InputError(
                f"{path}: the tensor {name} is none of a ResNet in torchvision's naming, nothing "
                "was loaded. tools/pretrain_net.py writes such files."
            )
        given[translated] = tensor
    _check_config(path, given, metadata, cfg)

    state = model.state_dict()
    wanted = backbone_names(state)
    stages = {_stage(name) for name in wanted}
    dropped = sorted(name for name in given if _stage(name) not in stages)
    problems = list(_problems(given, wanted, state, dropped, cfg.MODEL.RESNETS.NORM))
    if problems:
        raise InputError(
            f"{path} ({metadata['architecture']}) does not fit the detector, nothing was loaded; "
            f"{len(problems)} problems, the first: {'; '.join(problems[:5])}."
        )
    with torch.no_grad():
        for name, target in wanted.items():
            state[target].copy_(given[name])
    report = TransferReport(
        path,
        sha256(path),
        loaded=tuple(sorted(wanted.values())),
        dropped=tuple(dropped),
        new=tuple(sorted(state.keys() - set(wanted.values()) - _counters(state))),
        metadata=metadata,
    )
    _log(report)
    return report


def backbone_names(names: Iterable[str]) -> dict[str, str]:
    """Of a detector's tensor names those of its ResNet: `res2.0.conv1.weight` -> the full name."""
    found = {}
    for full_name in names:
        for prefix in BACKBONE_PREFIXES:
            name = full_name.removeprefix(prefix)
            if name != full_name and translate(name, DETECTRON2, TORCHVISION):
                found[name] = full_name
                break
    return found


def extract_backbone(model: nn.Module) -> dict[str, torch.Tensor]:
    """A detector's ResNet in torchvision's naming: float tensors on the CPU, copied.

    The other way of `load_backbone`: what that loaded comes back bit for bit.
    """
    state = getattr(model, "module", model).state_dict()
    return {
        translate(name, DETECTRON2, TORCHVISION): state[full_name].detach().cpu().clone()
        for name, full_name in backbone_names(state).items()
    }


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = read_safetensors(path)
    advice = "tools/pretrain_net.py writes such a file as OUTPUT_DIR/backbone.safetensors."
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected a backbone file (format {FORMAT}), found format "
            f"{metadata.get('format')!r}. {advice}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: expected format_version {FORMAT_VERSION}, found "
            f"{metadata.get('format_version')!r}. It is of another version of this project."
        )
    lacking = [key for key in METADATA if key not in metadata]
    if lacking:
        raise InputError(f"{path}: its metadata lacks {', '.join(lacking)}. {advice}")
    return tensors, metadata


def _check_config(
    path: str, given: dict[str, torch.Tensor], metadata: dict[str, str], cfg: CfgNode
) -> None:
    """Refuse a config that feeds the backbone other pixels, or builds another ResNet."""
    expected = {
        "INPUT.FORMAT": metadata["channel_order"],
        "MODEL.PIXEL_MEAN": _numbers(path, metadata, "pixel_mean"),
        "MODEL.PIXEL_STD": _numbers(path, metadata, "pixel_std"),
        "MODEL.RESNETS.STRIDE_IN_1X1": metadata["stride_in_1x1"] == "true",
        **_resnet_config(given),
    }
    found = {key: _get(cfg, key) for key in expected}
    wrong = [key for key in expected if not _same(expected[key], found[key])]
    if wrong:
        told = "; ".join(f"{key} is {found[key]}, the file says {expected[key]}" for key in wrong)
        lines = yaml.safe_dump(_nested({key: expected[key] for key in wrong}), sort_keys=False)
        raise InputError(
            f"{path} ({metadata['architecture']}): the config does not fit this backbone, and "
            f"nothing was loaded: {told}. Use:\n{lines.rstrip()}"
        )


def _numbers(path: str, metadata: dict[str, str], key: str) -> list[float]:
    try:
        return [float(value) for value in metadata[key].split(",")]
    except ValueError as error:
        raise InputError(
            f"{path}: expected numbers with commas in its metadata's {key}, found {metadata[key]!r}"
        ) from error


def _resnet_config(given: dict[str, torch.Tensor]) -> dict[str, int]:
    """The config that builds the ResNet of these tensors; empty where it is none that is known."""
    blocks = tuple(
        len({name.split(".")[1] for name in given if name.startswith(f"res{stage}.")})
        for stage in (2, 3, 4, 5)
    )
    bottleneck = "res2.0.conv3.weight" in given
    last = f"res2.0.conv{3 if bottleneck else 2}.weight"
    needed = ("stem.conv1.weight", "res2.0.conv1.weight", "res2.0.conv2.weight", last)
    if (blocks, bottleneck) not in DEPTHS or not all(name in given for name in needed):
        return {}
    stem, first, second, last = (given[name].shape for name in needed)
    config = {
        "DEPTH": DEPTHS[blocks, bottleneck],
        "STEM_OUT_CHANNELS": stem[0],
        "RES2_OUT_CHANNELS": last[0],
    }
    if bottleneck:
        groups = first[0] // second[1]
        config |= {"NUM_GROUPS": groups, "WIDTH_PER_GROUP": first[0] // groups}
    return {f"MODEL.RESNETS.{key}": value for key, value in config.items()}


def _problems(
    given: dict[str, torch.Tensor],
    wanted: dict[str, str],
    state: dict[str, torch.Tensor],
    dropped: list[str],
    norm: str,
) -> Iterable[str]:
    if not wanted:
        yield "the detector has no ResNet of detectron2's naming"
        return
    left_over = given.keys() - wanted.keys() - set(dropped)
    if any(name.endswith("running_mean") for name in left_over):
        yield (
            f"MODEL.RESNETS.NORM '{norm}' keeps no running statistics, which are a part of this "
            "backbone: use BN, SyncBN or FrozenBN"
        )
    yield from (f"{name} is missing in the file" for name in sorted(wanted.keys() - given.keys()))
    yield from (f"{name} of the file has no place" for name in sorted(left_over))
    for name in sorted(wanted.keys() & given.keys()):
        found, expected = tuple(given[name].shape), tuple(state[wanted[name]].shape)
        if found != expected:
            yield f"{name} has shape {found} in the file, {expected} in the detector"
        elif not torch.isfinite(given[name]).all():
            yield f"{name} holds NaN or Inf"


def _log(report: TransferReport) -> None:
    modules = sorted({".".join(name.split(".")[:2]) for name in report.new})
    logger.info(
        "%s: %d of %d backbone tensors set, 0 missing, %d dropped (%s, %s, iteration %s, sha256 "
        "%s); %d tensors start at their initialisation: %s",
        report.source,
        len(report.loaded),
        len(report.loaded),
        len(report.dropped),
        report.metadata["architecture"],
        report.metadata.get("source", "source not recorded"),
        report.metadata.get("iteration", "not recorded"),
        report.sha256[:12],
        len(report.new),
        ", ".join(modules),
    )
    if report.dropped:
        logger.warning(
            "%s: the detector has no %s, so %d tensors of the file were dropped",
            report.source,
            ", ".join(sorted({_stage(name) for name in report.dropped})),
            len(report.dropped),
        )


def _stage(name: str) -> str:
    return name.partition(".")[0]


def _counters(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith("num_batches_tracked")}


def _get(cfg: CfgNode, dotted: str) -> object:
    for name in dotted.split("."):
        cfg = cfg[name]
    return cfg


def _nested(values: dict[str, object]) -> dict:
    tree: dict = {}
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return tree


def _same(expected: object, found: object) -> bool:
    if isinstance(expected, list):
        return len(expected) == len(found) and all(
            abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in zip(expected, found)
        )
    return expected == found
