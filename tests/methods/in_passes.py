"""`python in_passes.py IMAGES FOLDER`: the same two updates, on processes and in passes.

In float64, by real gloo processes, through the trainer's own loader and loop.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import start_processes

from pretrain.config import load_pretrain_config
from pretrain.methods.method import Method, build_visual
from pretrain.trainer import PretrainTrainer


class Colours(Method):
    """Predict the mean colour of an image: a mean over images."""

    losses = ("loss_colours",)
    in_passes = True

    def __init__(self, cfg, num_outputs):
        super().__init__(cfg, num_outputs)
        self.visual = build_visual(cfg)
        self.head = nn.Linear(self.visual.feature_size, 3)

    def prepare(self, batch):
        ready = super().prepare(batch)
        return {**ready, "image": ready["image"].double()}

    def forward(self, batch):
        image = batch["image"]
        found = self.head(self.visual(image).mean((2, 3)))
        return {"loss_colours": F.mse_loss(found, image.mean((2, 3)))}


def train(rank: int, images: str, folder: Path, world: int, *opts: str) -> None:
    """Two updates of eight images; the first process writes the weights."""
    if world > 1:
        met = f"file://{folder}.met"
        dist.init_process_group("gloo", init_method=met, rank=rank, world_size=world)
    torch.set_default_dtype(torch.float64)
    pairs = {
        "MODEL.OBJECTIVE": "tests.methods.in_passes:Colours",
        "MODEL.DEVICE": "cpu",
        "MODEL.VISUAL.NAME": "resnet18",
        "MODEL.VISUAL.ZERO_INIT_RESIDUAL": "False",  # or the blocks have no gradient
        "DATA.FORMAT": "images",
        "DATA.TRAIN_IMAGES": images,
        "DATA.IMAGE_SIZE": "64",
        "DATA.NUM_WORKERS": "0",
        "SOLVER.IMS_PER_BATCH": "8",
        "SOLVER.CNN_LR": "0.05",
        "SOLVER.WARMUP_ITERS": "0",
        "SOLVER.LOOKAHEAD.ENABLED": "False",
        "SOLVER.AMP.ENABLED": "False",
        "OUTPUT_DIR": str(folder),
    }
    folder.mkdir(exist_ok=True)
    words = [word for pair in pairs.items() for word in pair]
    trainer = PretrainTrainer(load_pretrain_config(None, [*words, *opts]))
    for iteration in range(2):
        trainer.loop.step(iteration)
    if rank == 0:
        torch.save(trainer.method.state_dict(), folder / "weights.pth")
    if world > 1:
        dist.destroy_process_group()


def weights(images: str, folder: Path, world: int, *opts: str) -> dict[str, torch.Tensor]:
    start_processes(train, (images, folder, world, *opts), nprocs=world, start_method="fork")
    return torch.load(folder / "weights.pth", weights_only=True)


def difference(one: dict, other: dict, statistics: bool = False) -> float:
    """The largest one of weights, relative to each tensor's largest; or of running statistics."""
    names = [n for n in one if "running_mean" in n] if statistics else None
    names = names or [n for n in one if "running" not in n and "num_batches" not in n]
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in names)


def main(images: str, output: str) -> None:
    folder, sync = Path(output), ("MODEL.VISUAL.NORM", "SyncBN")
    whole = weights(images, folder / "whole", 1)
    passes = weights(images, folder / "passes", 1, "SOLVER.ACCUMULATE", "4")
    both = weights(images, folder / "both", 2, "SOLVER.ACCUMULATE", "2")
    four = weights(images, folder / "four", 4)
    synced = weights(images, folder / "synced", 4, *sync)
    again = weights(images, folder / "again", 2, *sync, "MODEL.VISUAL.RECOMPUTE", "blocks")
    assert difference(passes, four) < 1e-10, "four passes are four processes"
    assert difference(both, four) < 1e-10, "two passes of two processes are four processes"
    assert difference(whole, synced) < 1e-10, "with SyncBN four processes are one"
    assert difference(whole, again) < 1e-10, "and two that compute their blocks again"
    assert difference(whole, synced, statistics=True) < 1e-10, "their statistics are of all"
    assert difference(whole, four) > 1e-3, "and what norms see is what makes the difference"


if __name__ == "__main__":
    main(*sys.argv[1:])
