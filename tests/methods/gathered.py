"""`python gathered.py FOLDER`: gradients of a loss over two processes' instances, and over all."""

import sys

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from pretrain.methods.method import gather_instances


def loss_of(own: torch.Tensor, among: torch.Tensor, first: int) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(own @ among.T, first + torch.arange(len(own)))


def compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    given = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(3, 4) / 10)
    whole = layer(given)
    loss_of(whole, whole, 0).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    own = layer(given[3 * rank : 3 * rank + 3])
    loss_of(own, *gather_instances(own)).backward()
    dist.all_reduce(layer.weight.grad)
    torch.testing.assert_close(layer.weight.grad / 2, expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(compare, (sys.argv[1],), nprocs=2, start_method="fork")
