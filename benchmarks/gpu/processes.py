"""Step 7: a process group of one rank, preflight, DDP with the options of training, a clean end."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from virtex_d2.engine.distributed import wrap_ddp
from virtex_d2.engine.preflight import check_collectives, identity
from virtex_d2.engine.topology import Place

from .step import Step

ROOT = Path(__file__).resolve().parents[2]
SAME = 1e-4  # relative, of gradients with and without DDP


def run(step: Step) -> None:
    if not step.cuda:
        step.instead("NCCL", "gloo")
    # in a process of its own, because its end is looked at
    command = [sys.executable, "-m", "benchmarks.gpu.processes", step.device.type]
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE, timeout=step.left
        )
    except subprocess.TimeoutExpired:
        step.check("a clean end", False, "it hangs")
        return
    print(done.stdout)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    step.figure("process", found)
    step.check("the all-reduce is right", "all-reduce" in found, found.get("all-reduce", ""))
    apart = float(found.get("gradients apart", "nan"))
    step.check("DDP's gradients are the model's", apart <= SAME, f"{apart:.2g} apart")
    step.check("a clean end", done.returncode == 0, f"exit code {done.returncode}")
    step.headline(f"{found.get('backend')}, all-reduce {found.get('all-reduce')}")


def _one_rank(device: torch.device) -> None:
    """All that a rank of training does with its group; prints "name: figure" lines."""
    gpu = 0 if device.type == "cuda" else None
    backend = "gloo" if gpu is None else "nccl"
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    print(f"backend: {backend}")
    print(f"device: {identity(Place('check_gpu.py', 'here', gpu=gpu))['device']}")
    check_collectives(gpu)
    print("all-reduce: right")
    torch.manual_seed(0)
    model = torchvision.models.resnet18().to(device, memory_format=torch.channels_last)
    images = torch.rand(4, 3, 64, 64, device=device)
    model(images).sum().backward()
    alone = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad(set_to_none=True)
    alone_in_it, comm.get_world_size = comm.get_world_size, lambda: 2  # of one it would wrap none
    wrapped = wrap_ddp(model)
    comm.get_world_size = alone_in_it
    assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
    wrapped(images).sum().backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    print(f"gradients apart: {((ours - alone).norm() / alone.norm()).item()}")
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(torch.device(sys.argv[1]))
