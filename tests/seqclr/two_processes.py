"""`python two_processes.py FOLDER`: SeqCLR's loss and gradients over two processes, and over one.

In float64, with norms that see all processes' words; gradients are averaged as
DistributedDataParallel does.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from pretrain.config import load_pretrain_config
from pretrain.methods.method import build_method

OPTS = "MODEL.OBJECTIVE seqclr MODEL.DEVICE cpu MODEL.VISUAL.NAME resnet18 SEQCLR.MAPPING window"
OPTS += " SEQCLR.WINDOWS 3 SEQCLR.PROJECTION bilstm SEQCLR.PROJECTION_HIDDEN 8"
OPTS += " MODEL.VISUAL.ZERO_INIT_RESIDUAL False MODEL.VISUAL.NORM"


def build(synchronised: bool) -> nn.Module:
    torch.manual_seed(0)
    cfg = load_pretrain_config(None, [*OPTS.split(), "SyncBN" if synchronised else "BN"])
    return build_method(cfg).double().train()


def compare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # before the processes meet, so that nothing is gathered
    whole = build(synchronised=False)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 4, 3, 16, 32, dtype=torch.float64, generator=generator)
    expected = whole({"image": views.flatten(0, 1)})["loss_contrast"]
    expected.backward()

    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    method = build(synchronised=True)
    loss = method({"image": views[:, rank::2].flatten(0, 1)})["loss_contrast"]
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach())
    gradients = dict(whole.named_parameters())
    for name, parameter in method.named_parameters():
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / 2, gradients[name].grad, rtol=1e-7, atol=1e-9)
        assert parameter.grad.norm() > 0, name
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(compare, (sys.argv[1],), nprocs=2, start_method="fork")
