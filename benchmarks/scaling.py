#!/usr/bin/env python
"""How pretraining scales over processes, and what more GPUs can be expected to bring.

python benchmarks/scaling.py                     # 1, 2 and 4 gloo processes on this machine
python benchmarks/scaling.py --estimate          # 8 to 256 GPUs, from the numbers that it prints

Measured: a ResNet-18 captions forward and backward in DistributedDataParallel, one thread and the
same 16 images of 64 pixels in each process, gradients added up over gloo. World sizes take turns,
so that what else the machine does falls on all of them. Where there are more processes than
cores they share these: efficiency is of the cores that the processes can have. The share of time
in communication is what an iteration takes longer than one without an exchange of gradients
(`no_sync`), in the same processes.

Estimated: an iteration on N GPUs takes its computation, which is the same as on one, and an
all-reduce of the gradients. A ring moves 2 (N - 1) / N times their bytes over its slowest link
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
It overlaps the backward pass; how much is not known before it is measured, so that two
bounds are given: none of it, and all that fits into the backward pass (two thirds of the
computation). Data loading, stragglers and latency are left out: they are the user's to measure.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from pretrain.config import get_pretrain_cfg  # noqa: E402
from pretrain.methods.method import build_method  # noqa: E402
from virtex_d2.engine.config import load_config  # noqa: E402
from virtex_d2.engine.distributed import wrap_ddp  # noqa: E402

IMAGES, SIDE, WORDS, VOCAB = 16, 64, 20, 1000  # of a process
WARM_UP, ITERATIONS = 3, 10
BACKWARD = 2 / 3  # of an iteration's computation: twice the forward pass's operations
PAPER = ROOT / "configs/pretrain/bicaptioning_R_50_L1_H1024.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--estimate", action="store_true", help="do not measure: calculate")
    parser.add_argument(
        "--images-per-second", type=float, default=400.0, help="of one GPU; measure yours"
    )
    parser.add_argument("--images-per-gpu", type=int, default=32, help="of an iteration")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--node-gbit", type=float, default=100.0, help="network of a node, Gbit/s")
    parser.add_argument(
        "--gpu-gbyte", type=float, default=100.0, help="between GPUs of a node, GB/s"
    )
    args = parser.parse_args()
    if args.estimate:
        estimate(args)
    else:
        measure(args.processes, args.rounds)


def measure(world_sizes: list[int], rounds: int) -> None:
    """Print images a second, efficiency and the share of communication for each world size."""
    results: dict[int, list[dict[str, float]]] = {size: [] for size in world_sizes}
    for _ in range(rounds):
        for size in world_sizes:
            results[size].append(_run(size))
    cores = len(os.sched_getaffinity(0))
    rates = {
        size: [IMAGES * size / turn["synchronised"] for turn in turns]
        for size, turns in results.items()
    }
    alone = rates[world_sizes[0]]
    print(
        f"{cores} cores; {rounds} turns; gradients of {results[world_sizes[0]][0]['mbytes']:.1f} MB"
    )
    print("processes  images/s  (from to)       efficiency (from to)       communication (from to)")
    for size, turns in results.items():
        ideal = min(size, cores) / min(world_sizes[0], cores)
        efficiency = [rate / (ideal * base) for rate, base in zip(rates[size], alone)]
        shares = [1 - turn["alone"] / turn["synchronised"] for turn in turns]
        print(
            f"{size:9}  {statistics.median(rates[size]):8.1f}  "
            f"({min(rates[size]):5.1f} {max(rates[size]):5.1f})  "
            f"{statistics.median(efficiency):10.0%} ({min(efficiency):4.0%} {max(efficiency):4.0%})"
            f"  {statistics.median(shares):17.0%} ({min(shares):4.0%} {max(shares):4.0%})"
        )


def _run(world_size: int) -> dict[str, float]:
    """One turn: seconds of an iteration with and without the exchange of gradients."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _process, (world_size, folder), nprocs=world_size, start_method="spawn", join=True
        )
        return json.loads(Path(folder, "result.json").read_text())


def _process(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    cfg = get_pretrain_cfg()
    cfg.MODEL.VISUAL.NAME = "resnet18"
    cfg.MODEL.TEXTUAL.HIDDEN_SIZE = 128
    cfg.MODEL.TEXTUAL.ATTENTION_HEADS = 4
    model = wrap_ddp(build_method(cfg, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = {
        "image": torch.randn(IMAGES, 3, SIDE, SIDE),
        "caption_tokens": torch.randint(4, VOCAB, (IMAGES, WORDS)),
        "caption_lengths": torch.full((IMAGES,), WORDS),
    }

    def iterate() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(model(batch).values()).backward()
        optimizer.step()

    def seconds(count: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            iterate()
        dist.barrier()  # the slowest process counts
        return (time.perf_counter() - start) / count

    seconds(WARM_UP)
    synchronised = seconds(ITERATIONS)
    if world_size > 1:
        with model.no_sync():
            seconds(1)
            alone = seconds(ITERATIONS)
    else:
        alone = synchronised
    if rank == 0:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        result = {"synchronised": synchronised, "alone": alone, "mbytes": size / 1e6}
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def estimate(args: argparse.Namespace) -> None:
    """Print the two bounds for 8 to 256 GPUs."""
    cfg = load_config(get_pretrain_cfg(), str(PAPER), [])
    with torch.device("meta"):
        model = build_method(cfg, cfg.DATA.VOCAB_SIZE)
    count = sum(parameter.numel() for parameter in model.parameters())
    gbytes = 4 * count / 1e9
    computation = args.images_per_gpu / args.images_per_second
    print(f"{PAPER.stem}: {count / 1e6:.1f} M parameters, gradients of {1000 * gbytes:.0f} MB")
    print(
        f"assumed: {args.images_per_second:g} images/s on one GPU, {args.images_per_gpu} in an "
        f"iteration: {1000 * computation:.0f} ms of computation; {args.gpus_per_node} GPUs a node, "
        f"{args.gpu_gbyte:g} GB/s between them, {args.node_gbit:g} Gbit/s between nodes"
    )
    print("GPUs  all-reduce ms  efficiency: no overlap  full overlap    images/s: none  full")
    for gpus in (8, 16, 32, 64, 128, 256):
        link = args.gpu_gbyte if gpus <= args.gpus_per_node else args.node_gbit / 8
        exchange = 2 * (gpus - 1) / gpus * gbytes / link
        exposed = max(0.0, exchange - BACKWARD * computation)
        worst, best = (computation / (computation + extra) for extra in (exchange, exposed))
        ideal = gpus * args.images_per_second
        print(
            f"{gpus:4}  {1000 * exchange:13.1f}  {worst:22.0%}  {best:12.0%}"
            f"  {worst * ideal:16.0f}  {best * ideal:.0f}"
        )


if __name__ == "__main__":
    main()
