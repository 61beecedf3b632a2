"""A method of anybody's: reconstruct the image from its features, measured by PSNR."""

import torch
from torch import nn

from pretrain.export import Exported, tensors_of
from pretrain.methods.method import Method, build_visual

PEAK = 4.4  # of normalised pixels: about 1 / 0.225


class Reconstruction(Method):
    losses = ("loss_reconstruction",)
    metrics = ("psnr",)
    fresh = ("decoder.",)

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        width = cfg.RECONSTRUCTION.WIDTH
        self.decoder = nn.Sequential(
            nn.Conv2d(self.visual.feature_size, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1)
        )

    @staticmethod
    def add_config(cfg):
        cfg.RECONSTRUCTION = type(cfg)({"WIDTH": 8})

    def forward(self, batch):
        found = self.decoder(self.visual(batch["image"])).float()  # (N, 3, H / 32, W / 32)
        wanted = nn.functional.interpolate(batch["image"], found.shape[2:], mode="area")
        return {"loss_reconstruction": (found - wanted).square().mean()}

    def measure(self, batch):
        means = super().measure(batch)
        error, count = means["loss_reconstruction"]
        return {**means, "psnr": (10 * torch.log10(PEAK**2 / error), count)}

    @staticmethod
    def export(state, cfg):
        restorer = Exported(tensors_of(state, "decoder."), {"width": str(cfg.RECONSTRUCTION.WIDTH)})
        return {**Method.export(state, cfg), "restorer": restorer}
