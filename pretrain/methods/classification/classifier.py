"""Learn an image by the classes of the objects in it, several at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from pretrain.data.loader import ValSet
from pretrain.data.records import CaptionRecord
from pretrain.methods.classification.labels import LabelSamples, entropy_of_labels
from pretrain.methods.method import Batch, Method, build_visual
from virtex_d2.engine.errors import InputError


class LinearHead(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, feature_size: int, num_outputs: int):
        super().__init__()
        self.output = nn.Linear(feature_size, num_outputs)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, num_outputs)."""
        return self.output(features.mean(dim=(2, 3)))


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, V) float, (N, V) bool -> minus log-softmax, mean over labels, then over labelled rows.

    VirTex (section 4, ablation of tasks) and the released code, after Joulin et al. (arXiv
    1511.02251).
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    counts = labels.sum(dim=1)
    per_row = -(log_probs * labels).sum(dim=1) / counts.clamp(min=1)
    return per_row.sum() / (counts > 0).sum().clamp(min=1)


class MultilabelClassification(Method):
    """Predict the classes of the objects in the image (DATA.TRAIN_LABELS)."""

    losses = ("loss_classification",)
    in_passes = True

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        self.textual = LinearHead(self.visual.feature_size, num_outputs)

    @staticmethod
    def check(cfg: CfgNode) -> None:
        refuse_additions(cfg)

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> LabelSamples:
        return LabelSamples(cfg, train, val)

    def forward(self, batch: Batch) -> Batch:
        logits = self.textual(self.visual(batch["image"]))  # (N, V)
        return {"loss_classification": label_loss(logits, self.labels(batch))}

    def labels(self, batch: Batch) -> torch.Tensor:
        """(N, V) bool: the classes of each image."""
        labels, num_outputs = batch["labels"], self.textual.output.out_features
        # one column more takes the -1 of rows that have fewer labels than others
        chosen = torch.zeros(len(labels), num_outputs + 1, dtype=torch.bool, device=labels.device)
        return chosen.scatter_(1, labels % (num_outputs + 1), True)[:, :num_outputs]

    def count(self, batch: Batch) -> int:
        """Images with a label."""
        return int(self.labels(batch).any(dim=1).sum())

    def summarize(self, means: dict[str, float], val: ValSet) -> dict[str, float]:
        labels = val.samples.val_labels
        return {"label_entropy": entropy_of_labels(labels[i] for i in range(len(labels)))}


def refuse_additions(cfg: CfgNode) -> None:
    """Raise InputError where MODEL.CAPTIONING asks for what only captioning has."""
    if any(cfg.MODEL.CAPTIONING.values()):
        given = ", ".join(f"{key} {value}" for key, value in cfg.MODEL.CAPTIONING.items() if value)
        raise InputError(
            f"MODEL.CAPTIONING ({given}) is for captioning; MODEL.OBJECTIVE is "
            f"{cfg.MODEL.OBJECTIVE}. Set it to 0."
        )
