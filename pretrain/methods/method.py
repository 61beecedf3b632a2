"""The contract of a pretraining method: what differs between methods, and nothing else.

MODEL.OBJECTIVE names one: a word of `METHODS`, or "package.module:Class" for anybody's. The
trainer builds it, loads its data, trains, validates, resumes and exports it; docs/methods.md has
an example.
"""

import importlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from pretrain import optim
from pretrain.backbone import VisualBackbone, find_norm
from pretrain.data.loader import Samples, ValSet
from pretrain.data.records import CaptionRecord
from pretrain.export import Exported, export_backbone
from pretrain.start import load_start
from pretrain.transforms import normalize, upload
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.safe_load import StoredCheckpoint

_CAPTIONING = "pretrain.methods.captioning.model"
_CLASSIFICATION = "pretrain.methods.classification.classifier"
_SEQCLR = "pretrain.methods.seqclr"
METHODS = {
    "bicaptioning": f"{_CAPTIONING}:Captioning",
    "captioning": f"{_CAPTIONING}:ForwardCaptioning",
    "backward_captioning": f"{_CAPTIONING}:BackwardCaptioning",
    "masked_lm": f"{_CAPTIONING}:MaskedLanguageModel",
    "token_classification": f"{_CAPTIONING}:TokenClassification",
    "multilabel_classification": f"{_CLASSIFICATION}:MultilabelClassification",
    "ipt": "pretrain.methods.ipt.method:Restoration",
    "seqclr": f"{_SEQCLR}.method:SeqCLR",
    "word_recognition": f"{_SEQCLR}.recognizer:Recognizer",
}

Batch = dict[str, torch.Tensor]


class Method(nn.Module):
    """One way to pretrain a network. Must have `losses`, `__init__` and `forward`; may have more.

    An update sees one batch whole, unless `in_passes`: what compares a batch's instances may rely
    on that.

    Attributes:
        losses: names that `forward` gives, "loss_..."; their sum is minimised, each is validated.
        metrics: further numbers of `measure`, of which the highest is the best: "psnr".
        in_passes: whether SOLVER.ACCUMULATE may split a batch: only where each loss is a mean over
            images, or their words or labels, that are not compared with each other.
        unused_parameters: whether a step may leave some without a gradient: heads in turn.
        fresh: prefixes of tensors that MODEL.WEIGHTS does not give: new heads on a trained network.
    """

    losses: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    in_passes: bool = False
    unused_parameters: bool = False
    fresh: tuple[str, ...] = ()

    def __init__(self, cfg: CfgNode, num_outputs: int):
        """Build the network on the CPU; `num_outputs` is that of the samples."""
        super().__init__()

    @staticmethod
    def add_config(cfg: CfgNode) -> None:
        """Add the method's own group of keys, with their defaults."""

    @staticmethod
    def check(cfg: CfgNode) -> None:
        """Refuse what cannot be, before data is opened."""

    @classmethod
    def own_records(cls, cfg: CfgNode, train: bool) -> Sequence[CaptionRecord] | None:
        """Records of training (or of validation) in formats of the method's own; None where the
        config names those of `pretrain.data`. Empty: there is no validation.
        """
        return None

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> Samples:
        """What is made of an image.

        Args:
            train: None where it comes from pipes, empty where a run only evaluates.
            val: empty where there is no validation.
        """
        return Samples(cfg)

    def load_start(self, cfg: CfgNode, identity: Mapping[str, str]) -> None:
        """Load what a run begins with: MODEL.WEIGHTS, if any (`pretrain.start`).

        Args:
            identity: what the outputs mean: `Samples.identity`.
        """
        if cfg.MODEL.WEIGHTS:
            load_start(self, cfg, identity, self.fresh)

    def prepare(self, batch: dict) -> Batch:
        """Bring a loader's batch to the device, and make of its bytes what the network sees."""
        device = next(self.parameters()).device
        jitter = batch.get("jitter")  # is read on the host
        ready = {key: value for key, value in batch.items() if isinstance(value, int)}
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and key != "jitter":
                ready[key] = upload(value, device)
        # as the backbone wants pixels: it would move them otherwise
        last = getattr(getattr(self, "visual", None), "channels_last", False)
        layout = torch.channels_last if last else torch.contiguous_format
        return {**ready, "image": normalize(ready["image"], jitter, layout)}

    def forward(self, batch: Batch) -> Batch:
        """{"loss_...": scalar} of a prepared batch; in training its "iteration" counts updates."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """How many items a loss is a mean of."""
        return len(batch["image"])

    def measure(self, batch: Batch) -> dict[str, tuple[torch.Tensor, int]]:
        """Numbers of a validation batch: name -> mean and how many items it is a mean of."""
        count = self.count(batch)
        return {name: (loss, count) for name, loss in self(batch).items()}

    def summarize(self, means: Mapping[str, float], val: ValSet) -> dict[str, float]:
        """Numbers that follow from a validation's means, and what a blind model would reach."""
        return {}

    def pictures(self, val: ValSet, count: int) -> list[tuple[str, np.ndarray]]:
        """Name and (3, H, W) uint8 of pictures for TensorBoard, of `count` validation images."""
        return []

    def adapt(self, state: Batch, stored: StoredCheckpoint, fresh: tuple[str, ...]) -> Batch:
        """What MODEL.WEIGHTS gives to this model, by its names: of a file with other names, or a
        part of a larger model. Afterwards every tensor must fit.

        Args:
            state: the file's tensors by name.
            stored: the whole file.
            fresh: that of the class where a run starts from the file; () where it is evaluated.
        """
        return state

    def parameter_groups(self, cfg: CfgNode) -> list[dict]:
        """An optimizer's groups, each with a `name`; the rate of "cnn..." is logged on its own."""
        return optim.parameter_groups(cfg, self)

    @staticmethod
    def export(state: Batch, cfg: CfgNode) -> dict[str, Exported]:
        """OUTPUT_DIR/<name>.safetensors -> its content, of this method's state dict."""
        backbone = export_backbone(state, cfg)
        return {"backbone": backbone} if backbone.tensors else {}


def gather_instances(own: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(N, ...) -> (world size * N, ...) of all processes, with gradients; and where its own begin.

    Collective: for training, where all processes have batches of one size. As gradients are means
    over processes, a loss over all instances is the mean over a process's own rows.
    """
    if comm.get_world_size() == 1:
        return own, 0
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(own.contiguous())), comm.get_rank() * len(own)


def find_method(cfg: CfgNode) -> type[Method]:
    """The class that MODEL.OBJECTIVE names, after its `check` of the config."""
    method = import_method(cfg.MODEL.OBJECTIVE)
    method.check(cfg)
    return method


def import_method(name: str) -> type[Method]:
    """The class of a word of `METHODS`, or of "package.module:Class"."""
    module, colon, attribute = METHODS.get(name, name).partition(":")
    if not colon:
        raise InputError(
            f"MODEL.OBJECTIVE: {name!r} is not one of {', '.join(METHODS)}, nor of the form "
            "package.module:Class." + nearest(name, METHODS)
        )
    try:
        method = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"MODEL.OBJECTIVE {name}: cannot be imported: {error}. Is its folder on PYTHONPATH?"
        ) from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InputError(f"MODEL.OBJECTIVE {name}: expected a subclass of Method.")
    return method


def build_method(cfg: CfgNode, num_outputs: int = 0) -> Method:
    """The config's method with random weights, on the CPU."""
    return find_method(cfg)(cfg, num_outputs)


def build_visual(cfg: CfgNode) -> VisualBackbone:
    """The ResNet that MODEL.VISUAL describes; named `visual` in a method, it can be exported."""
    visual = cfg.MODEL.VISUAL
    if visual.COMPILE and visual.NORM != "BN":
        raise InputError(
            f"MODEL.VISUAL.COMPILE True with MODEL.VISUAL.NORM {visual.NORM}: expected BN; a norm "
            "that waits for other processes is not compiled."
        )
    return VisualBackbone(
        visual.NAME,
        visual.ZERO_INIT_RESIDUAL,
        visual.CHANNELS_LAST,
        visual.RECOMPUTE,
        visual.COMPILE,
        visual.RESIDUAL_SCALE,
        find_norm(visual.NORM, cfg.MODEL.DEVICE),
    )
