"""SeqCLR: tell a part of a word in one view among the parts of all words in another."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from pretrain.data.loader import Samples, Visit
from pretrain.data.records import CaptionRecord
from pretrain.export import Exported, export_backbone, load_weights
from pretrain.methods.method import Batch, Method
from pretrain.methods.seqclr.augmentation import (
    ViewDraws,
    add_augmentation_config,
    augment,
    check_augmentation,
)
from pretrain.methods.seqclr.encoder import (
    BACKBONE,
    add_encoder_config,
    build_encoder,
    check_encoder,
    export_encoder,
    holds_encoder,
    load_encoder,
    num_frames,
    training_strides,
)
from pretrain.methods.seqclr.loss import (
    MAPPINGS,
    PROJECTIONS,
    build_projection,
    instances_of,
    nt_xent,
)
from pretrain.methods.seqclr.words import open_words, word_pixels
from pretrain.transforms import normalize, upload
from virtex_d2.checkpoint.source import Source, local_path
from virtex_d2.engine.errors import InputError, nearest


class SeqCLR(Method):
    """Contrast instances along the text of two views of each word (arXiv 2012.10873).

    The encoder sees both views in one pass, so that norms see both; the released code gives it one
    after the other.
    """

    losses = ("loss_contrast",)
    metrics = ("pair_accuracy",)

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        own = self.own = cfg.SEQCLR
        self.encoder = build_encoder(cfg)
        size = self.encoder.context_features
        self.projection = build_projection(
            own.PROJECTION, size, own.PROJECTION_HIDDEN or size, own.PROJECTION_SIZE or size
        )
        self.radius = ViewDraws(own).radius

    @staticmethod
    def add_config(cfg: CfgNode) -> None:
        add_encoder_config(cfg)
        own = cfg.SEQCLR = type(cfg)()
        # What an instance is: "all" (a word), "window" or "frame".
        own.MAPPING = "window"
        # Windows of a word; or, where it is not 0, frames of a window, side by side.
        own.WINDOWS = 5
        own.WINDOW_FRAMES = 0
        # What frames pass before they become instances, in pretraining alone: "none", "linear",
        # "mlp" (of two layers) or "bilstm"; 0 is as many channels as the encoder's frames have.
        own.PROJECTION = "none"
        own.PROJECTION_HIDDEN = 0
        own.PROJECTION_SIZE = 0
        own.TEMPERATURE = 0.1
        add_augmentation_config(own)

    @staticmethod
    def check(cfg: CfgNode) -> None:
        check_encoder(cfg)
        check_augmentation(cfg.SEQCLR, "SEQCLR")
        own, frames = cfg.SEQCLR, num_frames(cfg.DATA.WORD_SIZE[1])
        for key, known in (("MAPPING", MAPPINGS), ("PROJECTION", PROJECTIONS)):
            if own[key] not in known:
                raise InputError(
                    f"SEQCLR.{key}: {own[key]!r} is not one of {', '.join(known)}."
                    + nearest(own[key], known)
                )
        for key, least in (("WINDOWS", 1), ("WINDOW_FRAMES", 0)):
            if not least <= own[key] <= frames:
                raise InputError(
                    f"SEQCLR.{key}: expected {least} to {frames}, the frames of a word of "
                    f"{cfg.DATA.WORD_SIZE[1]} pixels (DATA.WORD_SIZE), found {own[key]}."
                )
        if own.PROJECTION_HIDDEN < 0 or own.PROJECTION_SIZE < 0:
            raise InputError(
                "SEQCLR.PROJECTION_HIDDEN and PROJECTION_SIZE: expected channels, or 0 for those "
                f"of the frames, found {own.PROJECTION_HIDDEN} and {own.PROJECTION_SIZE}."
            )
        if cfg.SOLVER.IMS_PER_BATCH < 2:
            raise InputError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: expected 2 or more; a word is "
                "told among others."
            )
        if not own.TEMPERATURE > 0:
            raise InputError(f"SEQCLR.TEMPERATURE: expected more than 0, found {own.TEMPERATURE}.")
        if cfg.ENCODER.JOINED:
            raise InputError(
                "ENCODER.JOINED True: it is for decoders; pretraining contrasts the last stage's "
                "frames. Leave it False."
            )

    @classmethod
    def own_records(cls, cfg: CfgNode, train: bool) -> Sequence[CaptionRecord] | None:
        return open_words(cfg, train)

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> Samples:
        return TwoViews(cfg)

    def prepare(self, batch: dict) -> Batch:
        """Make both views of each word; `image` is (2 N, 3, H, W), all first ones first."""
        device = next(self.parameters()).device
        parts = {
            key: upload(batch[key], device) for key in ("image", "draws", "noise") if key in batch
        }
        images = torch.cat([parts["image"]] * 2)
        draws, noise = (
            torch.cat(parts[key].unbind(1)) if key in parts else None for key in ("draws", "noise")
        )
        last = self.encoder.visual.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        views = normalize(augment(images, draws, noise, self.radius), None, layout)
        return {"image": views, "iteration": batch.get("iteration", 0)}

    def instances(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised -> (N, instances, C)."""
        frames = self.projection(self.encoder.stages(image)[1])  # (N, T, C)
        own = self.own
        return instances_of(frames, own.MAPPING, own.WINDOWS, own.WINDOW_FRAMES)

    def compare(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """NT-Xent, and the share of instances whose pair is found; among this batch's, and in
        training those of all processes."""
        one, other = self.instances(batch["image"]).chunk(2)
        return nt_xent(one, other, self.own.TEMPERATURE, gather=self.training)

    def forward(self, batch: Batch) -> Batch:
        return {"loss_contrast": self.compare(batch)[0]}

    def count(self, batch: Batch) -> int:
        return len(batch["image"]) // 2

    def measure(self, batch: Batch) -> dict[str, tuple[torch.Tensor, int]]:
        loss, found = self.compare(batch)
        count = self.count(batch)
        return {"loss_contrast": (loss, count), "pair_accuracy": (found, count)}

    def load_start(self, cfg: CfgNode, identity: Mapping[str, str]) -> None:
        """Load a checkpoint of this method whole, or an encoder or any ResNet into the encoder."""
        path = cfg.MODEL.WEIGHTS
        if not path:
            return
        source = Source(local_path(path))
        if holds_encoder(source):
            load_weights(self, source.stored, identity, self.fresh)
        else:
            load_encoder(self.encoder, path, cfg)

    @staticmethod
    def export(state: Batch, cfg: CfgNode) -> dict[str, Exported]:
        tensors, metadata = export_backbone(state, cfg, BACKBONE)
        metadata["crop"] = "x".join(map(str, cfg.DATA.WORD_SIZE))
        metadata["training_strides"] = training_strides()
        return {"backbone": Exported(tensors, metadata), "encoder": export_encoder(state, cfg)}


class TwoViews(Samples):
    """A word, and what two views of it are made by.

    `image` (3, H, W) uint8; `draws` (2, `augmentation.NUMBERS`) float32; with STYLE `noise`
    (2, H, W) float32.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.size = tuple(cfg.DATA.WORD_SIZE)
        self.draw = ViewDraws(cfg.SEQCLR)

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        return self._sample(visit.image.whole(), visit.rng())

    def val(self, visit: Visit) -> list[dict[str, torch.Tensor]]:
        return [self._sample(visit.image, visit.rng())]

    def _sample(self, word: Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        height, width = self.size
        sample = {
            "image": word_pixels(word, self.size),
            "draws": torch.stack([self.draw(rng) for _ in range(2)]),
        }
        if self.draw.style:
            sample["noise"] = self.draw.noise(rng, 2 * height, width).view(2, height, width)
        return sample
