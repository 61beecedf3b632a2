"""Images of words -> frames, from left to right: a ResNet that keeps the width, and BiLSTMs.

The ResNet is torchvision's, by name and weights, so that a detector can be given it; strides are
no weights. Decoders read what `Encoder` gives; `load_encoder` starts one from any ResNet.
"""

import logging
import re

import torch
from detectron2.config import CfgNode
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from pretrain.backbone import VisualBackbone
from pretrain.export import Exported, differences, tensors_of
from pretrain.methods.method import Batch, build_visual
from pretrain.start import load_resnet
from pretrain.transforms import normalize
from virtex_d2.checkpoint.source import Source, local_path
from virtex_d2.engine.backbone_file import IMAGENET_RGB
from virtex_d2.engine.errors import InputError, nearest

logger = logging.getLogger(__name__)

CONTEXTS = ("none", "bilstm")
# Of a BiLSTM and of what it gives out.
CONTEXT_SIZE = 256
# Height and width of the stages' first strides while words are learnt.
STRIDES = {"layer2": (2, 1), "layer3": (2, 1), "layer4": (2, 1)}
SMALLEST = 16  # pixels of a side
# Where a method that has an encoder keeps its ResNet.
BACKBONE = "encoder.visual.cnn."
FORMAT = "virtex_d2.word_encoder"
VERSION = "1"


def add_encoder_config(cfg: CfgNode) -> None:
    """Add the group ENCODER, which pretraining and recognition share."""
    cfg.ENCODER = type(cfg)()
    # What follows the ResNet: "none", or "bilstm": two of them, which see the whole word.
    cfg.ENCODER.CONTEXT = "none"
    # Decoders read the ResNet's frames beside those of the BiLSTMs.
    cfg.ENCODER.JOINED = False


def check_encoder(cfg: CfgNode) -> None:
    """Refuse values of ENCODER and DATA.WORD_SIZE that cannot be."""
    size, context = tuple(cfg.DATA.WORD_SIZE), cfg.ENCODER.CONTEXT
    if len(size) != 2 or not all(isinstance(side, int) and side >= SMALLEST for side in size):
        raise InputError(
            f"DATA.WORD_SIZE: expected height and width, each of at least {SMALLEST} pixels, found "
            f"{size}."
        )
    if context not in CONTEXTS:
        raise InputError(
            f"ENCODER.CONTEXT: {context!r} is not one of {', '.join(CONTEXTS)}."
            + nearest(context, CONTEXTS)
        )
    if cfg.ENCODER.JOINED and context == "none":
        raise InputError(
            "ENCODER.JOINED True with ENCODER.CONTEXT none: there is nothing to join the ResNet's "
            "frames with. Set ENCODER.CONTEXT bilstm."
        )


class BiLSTM(nn.Module):
    """A bidirectional LSTM and a linear layer over both directions.

    Names as in clovaai's deep-text-recognition-benchmark (`modules/sequence_modeling.py`) and in
    semimtr's projection.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.rnn = nn.LSTM(in_features, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, out_features)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, T, in_features) -> (N, T, out_features)."""
        self.rnn.flatten_parameters()
        return self.linear(self.rnn(frames)[0])


class Encoder(nn.Module):
    """A ResNet with a column of its map for a frame; optionally two BiLSTMs over the frames.

    SeqCLR (Aberdam et al., arXiv 2012.10873, section 3) pretrains all that stands before a
    recogniser's decoder. Parameters are named `visual.cnn.conv1.weight`, ..., `context.0.rnn...`.

    Args:
        visual: its strides become `STRIDES`: a frame for four pixels of width.
        context: one of `CONTEXTS`.
        joined: whether decoders read the ResNet's frames as well.

    Attributes:
        out_features: channels of `forward`'s frames.
        context_features: channels of the last stage's frames.
    """

    def __init__(self, visual: VisualBackbone, context: str = "none", joined: bool = False):
        super().__init__()
        self.visual = visual
        for name, stride in STRIDES.items():
            for module in getattr(visual.cnn, name)[0].modules():
                if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                    module.stride = stride
        size = self.context_features = visual.feature_size
        self.context = nn.Sequential()
        if context == "bilstm":
            self.context_features = CONTEXT_SIZE
            self.context = nn.Sequential(
                BiLSTM(size, CONTEXT_SIZE, CONTEXT_SIZE),
                BiLSTM(CONTEXT_SIZE, CONTEXT_SIZE, CONTEXT_SIZE),
            )
        self.joined = joined
        self.out_features = self.context_features + (size if joined else 0)

    def stages(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) normalised -> frames of the ResNet, and of the last stage: (N, T, C) each.

        T is `num_frames(W)`. Without BiLSTMs both are the same.
        """
        frames = self.visual(image).mean(dim=2).transpose(1, 2)  # (N, T, C)
        return frames, self.context(frames)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised -> (N, T, out_features), what a decoder reads."""
        frames, context = self.stages(image)
        return torch.cat([frames, context], dim=2) if self.joined else context


def build_encoder(cfg: CfgNode) -> Encoder:
    """The encoder that ENCODER and MODEL.VISUAL describe, with random weights."""
    return Encoder(build_visual(cfg), cfg.ENCODER.CONTEXT, cfg.ENCODER.JOINED)


def num_frames(width: int) -> int:
    """Frames of a word that is `width` pixels wide: 25 of 100.

    >>> num_frames(100), num_frames(101)
    (25, 26)
    """
    return -(-width // 4)  # convolution and pooling of the stem halve it, rounding up


def export_encoder(state: Batch, cfg: CfgNode, prefix: str = "encoder.") -> Exported:
    """The encoder in a method's state dict, and all that is needed to build it again."""
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "architecture": cfg.MODEL.VISUAL.NAME,
        "context": cfg.ENCODER.CONTEXT,
        "size": f"{cfg.DATA.WORD_SIZE[0]}x{cfg.DATA.WORD_SIZE[1]}",
        "training_strides": training_strides(),
        **IMAGENET_RGB.metadata(),
    }
    return Exported(tensors_of(state, prefix), metadata)


def training_strides() -> str:
    """`STRIDES` as metadata of files."""
    return ", ".join(f"{name} {down}x{along}" for name, (down, along) in STRIDES.items())


def load_encoder(encoder: Encoder, path: str, cfg: CfgNode) -> None:
    """Load `encoder.safetensors` whole, or the ResNet of any checkpoint a detector takes.

    With the latter, BiLSTMs keep what they have, and the ResNet is verified at its own strides
    (`pretrain.start.load_resnet`). All tensors are loaded, or none.

    Args:
        encoder: of the file's architecture and context.
        path: encoder.safetensors, backbone.safetensors of any pretraining, or another project's
            checkpoint.
        cfg: the run's; its VIRTEX group says which of the file's networks is meant.
    """
    source = Source(local_path(path))
    if source.stored.metadata.get("format") == FORMAT:
        _, context, _ = _described(source)
        own = "bilstm" if len(encoder.context) else "none"
        if context != own:
            raise InputError(
                f"{path}: an encoder with ENCODER.CONTEXT {context}, where this run has {own}. "
                f"Nothing was loaded. Set ENCODER.CONTEXT {context}."
            )
        _load_strictly(encoder, source.stored.content, path)
        logger.info("Loaded the whole encoder of %s.", path)
        return
    if holds_encoder(source):
        raise InputError(
            f"{path}: a whole run's checkpoint. Give the encoder.safetensors that lies beside it, "
            "which pretraining of words writes."
        )
    plain = VisualBackbone(encoder.visual.name)
    load_resnet(plain, source, cfg)
    encoder.visual.cnn.load_state_dict(plain.cnn.state_dict())
    if len(encoder.context):
        logger.info("The BiLSTMs start anew.")


def holds_encoder(source: Source) -> bool:
    """Whether a file is of a whole method with an encoder, BiLSTMs included."""
    return any(BACKBONE in name for state in source.states.values() for name in state)


def read_encoder(path: str, joined: bool = False) -> tuple[Encoder, tuple[int, int]]:
    """Build the encoder of an `encoder.safetensors`, in evaluation mode on the CPU.

    Returns:
        The encoder, and height and width in pixels of the words that it was trained with.
    """
    source = Source(local_path(path))
    architecture, context, size = _described(source)
    encoder = Encoder(VisualBackbone(architecture), context, joined and context != "none")
    _load_strictly(encoder, source.stored.content, path)
    return encoder.eval(), size


@torch.no_grad()
def frozen_frames(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """Frames of a frozen encoder: whatever mode it is in, running statistics are used, and kept.

    Args:
        encoder: on any device.
        pixels: (N, 3, H, W) uint8 RGB, words of the encoder's size.

    Returns:
        (N, T, out_features) float32 on the encoder's device.
    """
    training = encoder.training
    device = next(encoder.parameters()).device
    try:
        return encoder.eval()(normalize(pixels.to(device))).float()
    finally:
        encoder.train(training)


def gather_statistics(encoder: Encoder, pixels: torch.Tensor) -> None:
    """Gather an encoder's running statistics anew; it keeps its mode, and its weights.

    Those of a network that never trained are 0 and 1, which fit no batch: frozen, it says little of
    what it could.

    Args:
        encoder: on any device.
        pixels: (N, 3, H, W) uint8 RGB, words of the encoder's size; 100 make a batch.
    """
    training = encoder.training
    device = next(encoder.parameters()).device
    batches = pixels.split(100)
    ready = (normalize(batch.to(device)) for batch in batches)
    try:
        update_bn_stats(encoder.train(), ready, len(batches))
    finally:
        encoder.train(training)


def _described(source: Source) -> tuple[str, str, tuple[int, int]]:
    """Architecture, context and size that the metadata of an encoder's file state."""
    metadata, path = source.stored.metadata, source.path
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: expected an encoder.safetensors of word pretraining, found "
            f"{metadata.get('format') or 'no such metadata'}. tools/pretrain_net.py with "
            "MODEL.OBJECTIVE seqclr writes it."
        )
    if metadata.get("format_version") != VERSION:
        raise InputError(
            f"{path}: expected format_version {VERSION}, found "
            f"{metadata.get('format_version')!r}. It is of another version of this project."
        )
    size = re.fullmatch(r"(\d+)x(\d+)", metadata.get("size", ""))
    if metadata.get("context") not in CONTEXTS or not size or "architecture" not in metadata:
        raise InputError(
            f"{path}: its metadata lack architecture, context ({' or '.join(CONTEXTS)}) or size "
            "(32x100). Export it again: a run that goes on with --resume writes it anew."
        )
    return metadata["architecture"], metadata["context"], (int(size[1]), int(size[2]))


def _load_strictly(module: nn.Module, tensors: Batch, path: str) -> None:
    """Load all tensors but the batch counters, which files do not keep."""
    own = module.state_dict()
    counters = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")}
    if problems := differences(own, {**counters, **tensors}):
        raise InputError(
            f"{path} is not of this encoder: {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Nothing was loaded. MODEL.VISUAL.NAME and ENCODER.CONTEXT "
            "must be those of the file."
        )
    module.load_state_dict({**own, **tensors})
