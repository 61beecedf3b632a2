"""Load a ResNet into a detector so that it is the network that was pretrained, or nothing is."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import detectron2
import torch
import yaml
from detectron2.config import CfgNode
from torch import nn

import virtex_d2
from virtex_d2.checkpoint.layouts import DETECTRON2, TORCHVISION, is_counter, translate
from virtex_d2.checkpoint.probe import TOLERANCE, ProbeResult, probe
from virtex_d2.checkpoint.resnet import doubt_of_scale
from virtex_d2.checkpoint.source import Backbone, Source, local_path
from virtex_d2.checkpoint.starts import is_random
from virtex_d2.checkpoint.statements import PIXELS, same
from virtex_d2.engine.backbone_file import IMAGENET_RGB, Preprocessing
from virtex_d2.engine.checkpointer import has_checkpoint, last_whole_checkpoint
from virtex_d2.engine.config import get_key, set_key
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path

logger = logging.getLogger(__name__)

REPORT_NAME = "transfer_report.json"
MODES = ("check", "auto", "config")  # of VIRTEX.PREPROCESSING
_VOUCH = (
    "Find out how it was trained, set INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and "
    "MODEL.RESNETS.STRIDE_IN_1X1 so, and vouch for them with VIRTEX.PREPROCESSING config."
)
_OTHER_WAYS = "(VIRTEX.PREPROCESSING auto sets them; config believes the config.)"

# Where detectors keep their ResNet: FPN; C4 and others without FPN; res5 of C4's ROI heads.
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.", "roi_heads.")

_AS_IN_BACKBONE = (
    *("sha256", "layout", "copy", "beside", "assumed", "notes", "metadata"),
    "last_norm_scale",
)


@dataclass(frozen=True)
class TransferReport:
    """What a load did. Fields without a comment are those of `Backbone`."""

    source: str
    sha256: str
    layout: str
    copy: str
    architecture: str
    loaded: tuple[str, ...]  # the detector's names of the tensors that were set: its whole backbone
    dropped: tuple[str, ...]  # the file's tensors that this detector has no use for
    beside: tuple[str, ...]
    new: tuple[str, ...]  # the detector's tensors that no backbone has (FPN, RPN, heads)
    preprocessing: dict[str, object]  # the config keys that the backbone wants
    assumed: tuple[str, ...]
    vouched: bool  # whether the config is believed instead of the file
    probe: dict[str, float]  # relative error by stage; empty where the probe is off
    last_norm_scale: float | None
    notes: tuple[str, ...]
    metadata: dict[str, str]
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "virtex_d2": virtex_d2.__version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
        }
    )

    def write(self, folder: str) -> str:
        """Write transfer_report.json into the output folder; returns its path."""
        path = os.path.join(folder, REPORT_NAME)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


def open_weights(cfg: CfgNode, resume: bool = False) -> Source | None:
    """The file that a run starts from: MODEL.WEIGHTS, or its last checkpoint; None: there is none.

    To be opened once, and dropped when the weights are set. A run that is resumed goes by its last
    checkpoint, so that the file that it started from may be gone by then.
    """
    if resume and has_checkpoint(cfg.OUTPUT_DIR):
        # There is no log yet; where it is not the last one, that is told when it is loaded.
        return Source(last_whole_checkpoint(cfg.OUTPUT_DIR, tell=False))
    return None if is_random(cfg.MODEL.WEIGHTS) else Source(local_path(cfg.MODEL.WEIGHTS))


def apply_preprocessing(cfg: CfgNode, source: Source | None) -> list[str]:
    """Bring the preprocessing of config and weights together, before a detector is built.

    With VIRTEX.PREPROCESSING "auto", the config's keys are set to those of the backbone or the
    whole detector, in place. With "check", a whole detector's are compared (a backbone's at its
    load). What a detector's checkpoint does not say is left to the config.

    Returns:
        A line for the log about each key that was changed, and one about what was not checked;
        there is no log yet at that time.
    """
    mode = cfg.VIRTEX.PREPROCESSING
    if mode not in MODES:
        raise InputError(f"VIRTEX.PREPROCESSING is '{mode}'; expected one of {', '.join(MODES)}.")
    if mode == "config" or source is None:
        return []
    path, lines, assumed = source.path, [], ()
    if source.is_detector:
        said, doubts = source.statements()
        trained = {key: statement.value for key, statement in said.items()}
        if doubts:
            raise InputError(f"{path}: {doubts[0]}. {_VOUCH}")
        unsaid = [key for key in PIXELS if key not in trained]
        if unsaid:
            lines = [
                f"{path}: this detector's file does not say what it was trained with as "
                f"{', '.join(unsaid)}: not checked, the config is believed"
            ]
    elif mode == "auto":
        backbone = _backbone_of(source, cfg)
        trained, assumed = _known_preprocessing(backbone).config(), backbone.assumed
    else:
        return []
    found = {key: get_key(cfg, key) for key in trained}
    other = {key: value for key, value in trained.items() if not same(value, found[key])}
    if mode == "check" and other:
        told = "; ".join(f"{key} is {found[key]}, not {value}" for key, value in other.items())
        raise InputError(
            f"{path}: this detector was trained with other pixels than the config feeds it: {told}."
            f" {_OTHER_WAYS} Use:\n{_yaml(other)}"
        )
    for key, value in other.items():
        set_key(cfg, key, value)
        reason = f"assumed: {path} does not say" if key in assumed else f"as {path} says"
        lines.append(f"{key}: {found[key]} -> {value}, {reason}")
    return lines


def load_backbone(model: nn.Module, source: Source, cfg: CfgNode) -> TransferReport:
    """Set every backbone tensor of a detector from a checkpoint, running statistics included.

    Frozen stages (FREEZE_AT) get the file's statistics too, res5 of a C4 detector lies in its ROI
    heads. What the file lacks keeps its initialisation: FPN, RPN, heads, C4's extra norm. Then the
    stages' outputs are compared with the source network's (`probe`).

    Args:
        model: a detectron2 detector with a ResNet, possibly in DistributedDataParallel.
        source: a checkpoint of any layout in `layouts.LAYOUTS`, or a backbone file.
        cfg: the detector's config; what it does to pixels must be what the backbone was trained
            with, and its ResNet that of the file.
    """
    backbone = _backbone_of(source, cfg)
    model = getattr(model, "module", model)
    vouched = cfg.VIRTEX.PREPROCESSING == "config"
    wanted_config = dict(backbone.architecture.config())
    if not vouched:
        wanted_config |= _known_preprocessing(backbone).config()
    _check_config(backbone, wanted_config, cfg)

    given = {translate(n, TORCHVISION, DETECTRON2): t for n, t in backbone.tensors.items()}
    state = model.state_dict()
    wanted = backbone_names(state)
    stages = {_stage(name) for name in wanted}
    unused = sorted(name for name in given if _stage(name) not in stages)
    there = [translate(name, DETECTRON2, TORCHVISION) for name in unused]
    problems = list(_problems(given, wanted, state, unused, cfg.MODEL.RESNETS.NORM))
    if problems:
        raise InputError(
            f"{backbone.path} ({backbone.architecture.name}) does not fit the detector, nothing "
            f"was loaded; {len(problems)} problems, the first: {'; '.join(problems[:5])}."
        )
    with torch.no_grad():
        for name, target in wanted.items():
            state[target].copy_(given[name])

    used = config_preprocessing(cfg) if vouched else _known_preprocessing(backbone)
    result = ProbeResult({})
    if cfg.VIRTEX.PROBE:
        result = probe(model, backbone, used, cfg.INPUT.FORMAT)
    report = TransferReport(
        source=backbone.path,
        architecture=backbone.architecture.name,
        loaded=tuple(sorted(wanted.values())),
        dropped=(*backbone.dropped, *(backbone.names.get(n, n) for n in there)),
        new=tuple(sorted(n for n in state if n not in set(wanted.values()) and not is_counter(n))),
        preprocessing=used.config(),
        vouched=vouched,
        probe=result.errors,
        **{name: getattr(backbone, name) for name in _AS_IN_BACKBONE},
    )
    _log(report, backbone, cfg, unused)
    if not result.passed:
        raise InputError(
            f"{backbone.path}: all {len(wanted)} tensors were set, but the detector does not "
            f"compute what the pretrained network computes (relative error by stage: "
            f"{result.summary()}; at most {TOLERANCE:g}). Likely cause: {result.cause}."
        )
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


def _backbone_of(source: Source, cfg: CfgNode) -> Backbone:
    return source.backbone(cfg.VIRTEX.LAYOUT, cfg.VIRTEX.COPY, cfg.VIRTEX.PREFIX)


def _known_preprocessing(backbone: Backbone) -> Preprocessing:
    if backbone.doubts:
        raise InputError(f"{backbone.path}: {backbone.doubts[0]}. Nothing was loaded. {_VOUCH}")
    if backbone.preprocessing is None:
        lines = _yaml(IMAGENET_RGB.config())
        raise InputError(
            f"{backbone.path}: files of layout {backbone.layout} do not say what their network was "
            "trained with. Set these keys in the config, here torchvision's, and vouch for them "
            f"with VIRTEX.PREPROCESSING config:\n{lines}"
        )
    return backbone.preprocessing


def config_preprocessing(cfg: CfgNode) -> Preprocessing:
    """What a detector of this config is fed."""
    return Preprocessing.of_config({key: get_key(cfg, key) for key in PIXELS})


def _check_config(backbone: Backbone, expected: dict[str, object], cfg: CfgNode) -> None:
    """Refuse a config that feeds the backbone other pixels, or builds another ResNet."""
    found = {key: get_key(cfg, key) for key in expected}
    wrong = [key for key in expected if not same(expected[key], found[key])]
    if wrong:
        told = "; ".join(
            f"{key} is {found[key]}, "
            f"{'assumed is' if key in backbone.assumed else 'the file says'} {expected[key]}"
            for key in wrong
        )
        raise InputError(
            f"{backbone.path} ({backbone.architecture.name}, layout {backbone.layout}): the config "
            f"does not fit this backbone, and nothing was loaded: {told}. {_OTHER_WAYS} Use:\n"
            f"{_yaml({key: expected[key] for key in wrong})}"
        )


def _problems(
    given: dict[str, torch.Tensor],
    wanted: dict[str, str],
    state: dict[str, torch.Tensor],
    unused: list[str],
    norm: str,
) -> Iterable[str]:
    if not wanted:
        yield "the detector has no ResNet of detectron2's naming"
        return
    left_over = given.keys() - wanted.keys() - set(unused)
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


def _log(report: TransferReport, backbone: Backbone, cfg: CfgNode, unused: list[str]) -> None:
    modules = _modules(report.new, report.loaded)
    rows = {
        "source": f"{report.source} (sha256 {report.sha256[:12]})",
        "layout": f"{report.layout}, {report.copy}: {report.architecture}",
        "set": f"{len(report.loaded)} of {len(report.loaded)} backbone tensors set, 0 missing",
        "dropped": f"{len(report.dropped)}{_some(report.dropped)}",
        "new": f"{len(report.new)} tensors start at their initialisation: {', '.join(modules)}",
        "pixels": ("believed from the config: " if report.vouched else "")
        + ", ".join(f"{key} {value}" for key, value in report.preprocessing.items()),
        "probe": ", ".join(f"{stage} {error:.1e}" for stage, error in report.probe.items())
        or "off",
        "scales": "folded into the norms' weights"
        if report.last_norm_scale is None
        else f"median {report.last_norm_scale:.3g} of the residual blocks' last norms",
    }
    if not report.vouched:
        assumed = ", ".join(report.assumed)
        rows["pixels"] += f"; the file does not say, assumed: {assumed}" if assumed else ""
        rows["pixels"] += "" if assumed else ", as the file says"
    for key in ("source", "iteration"):
        if key in report.metadata:
            rows["layout"] += f"; {key} {report.metadata[key]}"
    logger.info(
        "Backbone loaded:\n%s", "\n".join(f"  {key:8} {value}" for key, value in rows.items())
    )
    for note in report.notes:
        logger.info("%s: %s", report.source, note)
    doubt = "" if report.last_norm_scale is None else doubt_of_scale(report.last_norm_scale)
    if doubt:
        logger.warning("%s: %s", report.source, doubt)
    if unused:
        logger.warning(
            "%s: the detector has no %s, so %d tensors of the file were dropped",
            report.source,
            ", ".join(sorted({_stage(name) for name in unused})),
            len(unused),
        )
    frozen = cfg.MODEL.RESNETS.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0
    if frozen and any("never trained" in note for note in report.notes):
        logger.warning(
            "%s: norms are frozen (MODEL.RESNETS.NORM %s, MODEL.BACKBONE.FREEZE_AT %d) at "
            "statistics of 0 and 1; where these were never trained, and are not folded into the "
            "norms' weights, the features behind them are on no useful scale",
            report.source,
            cfg.MODEL.RESNETS.NORM,
            cfg.MODEL.BACKBONE.FREEZE_AT,
        )


def _modules(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The modules of tensors, to two levels, or three where the two are of `others` as well."""
    shared = {tuple(name.split(".")[:2]) for name in others}
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[: 3 if tuple(p[:2]) in shared else 2]) for p in parts})


def _some(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _stage(name: str) -> str:
    return name.partition(".")[0]


def _yaml(values: dict[str, object]) -> str:
    tree: dict = {}
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return yaml.safe_dump(tree, sort_keys=False).rstrip()
