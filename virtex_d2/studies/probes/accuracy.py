"""Top-1 and top-5 accuracy, over all processes and for each class."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.utils import comm


class Accuracy:
    """Counts right answers.

    Args:
        classes: names; top-5 is counted where there are more than five.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = classes
        # a row for each class: images, right at the first, right among the first five
        self._counts = torch.zeros(len(classes), 3, dtype=torch.int64)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Logits (N, C) and labels (N,) of images that were not added before."""
        best = logits.topk(min(5, len(self._classes)), dim=1).indices.cpu()
        right = best == labels.cpu()[:, None]
        counts = [torch.ones(len(labels)), right[:, 0], right.any(1)]
        self._counts.index_add_(0, labels.cpu(), torch.stack(counts, 1).to(torch.int64))

    def gather(self) -> None:
        """Add up what all processes counted; to be called in each, once, at the end."""
        self._counts = torch.stack(comm.all_gather(self._counts)).sum(0)

    def metrics(self) -> dict[str, float]:
        """Percent over all images: "top1", and "top5" where it says something."""
        images, first, among_five = self._counts.sum(0).tolist()
        metrics = {"top1": 100 * first / images}
        if len(self._classes) > 5:
            metrics["top5"] = 100 * among_five / images
        return metrics

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class; accuracies of a class without test images are None."""
        return [
            {"class": name, "images": images, "top1": 100 * first / images if images else None}
            for name, (images, first, _) in zip(self._classes, self._counts.tolist())
        ]
