"""A method of anybody's: two heads in turn, which tell an image among those of all processes."""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.methods.method import Method, build_visual, gather_instances

HEADS = ("maximum", "mean")


class TakingTurns(Method):
    losses = tuple(f"loss_{name}" for name in HEADS)
    metrics = ("accuracy",)
    unused_parameters = True

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        self.heads = nn.ModuleDict({n: nn.Linear(self.visual.feature_size, 32) for n in HEADS})

    def forward(self, batch):
        heads = [HEADS[batch["iteration"] % 2]] if self.training else HEADS
        compared = {name: self.compare(batch, name) for name in heads}
        return {f"loss_{n}": F.cross_entropy(*pair) for n, pair in compared.items()}

    def compare(self, batch, head):
        image = batch["image"]
        pool = F.adaptive_max_pool2d if head == "maximum" else F.adaptive_avg_pool2d
        one, other = (pool(self.visual(x), 1).flatten(1) for x in (image, image.flip(3)))
        one, other = (F.normalize(self.heads[head](x).float()) for x in (one, other))
        among, first = gather_instances(other) if self.training else (other, 0)
        own = first + torch.arange(len(one), device=one.device)
        return 10 * one @ among.T, own  # (N, all), (N,)

    def measure(self, batch):
        right = [(s.argmax(1) == own).float() for s, own in (self.compare(batch, h) for h in HEADS)]
        return {**super().measure(batch), "accuracy": (torch.cat(right).mean(), self.count(batch))}
