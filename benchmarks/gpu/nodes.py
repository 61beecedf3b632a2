"""What several processes find together, before the steps: places, bandwidth, folder, requeue."""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from virtex_d2.engine.distributed import describe
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.preflight import check_shared
from virtex_d2.engine.stopping import MARKER_VARIABLE
from virtex_d2.engine.unfinished import EXIT_UNFINISHED

FILE = "nodes.json"
# GB/s of the largest message on GPUs: 278 MB of gradients in less than a backward pass
LEAST_BANDWIDTH = 5.0


def main(args: argparse.Namespace) -> None:
    """In every process of the run; the first one writes `args.output`/nodes.json.

    As a job of tools/launch_slurm.py it then asks once to be requeued, and ends unfinished.

    Raises:
        SystemExit: the job is to be requeued.
    """
    first = comm.is_main_process()
    record: dict[str, Any] = {"checks": [], "figures": {}, "notes": []}
    gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    mine = torch.cuda.get_device_properties(device).uuid if gpu else f"process {os.getpid()}"
    places = comm.all_gather((platform.node(), str(mine)))
    told = f"{len(places)} ranks on {len(set(places))} {'GPUs' if gpu else 'processes'}"
    _check(record, "a GPU for each rank", len(set(places)) == len(places), told)
    record["figures"]["places"] = [line.strip() for line in describe()]
    check_shared(str(args.output))
    _check(record, "all see the output folder", True, str(args.output))
    table = _bandwidth(device)
    record["figures"]["all-reduce, GB/s by bytes"] = {
        str(size): found["gb_per_s"] for size, found in table.items()
    }
    wrong = [size for size, found in table.items() if not found["right"]]
    _check(record, "sums are right", not wrong, wrong if wrong else f"of {len(table)} sizes")
    largest = table[max(table)]["gb_per_s"]
    told = f"{largest:.3g} GB/s"
    if gpu:
        _check(
            record, "bandwidth", largest >= LEAST_BANDWIDTH, f"{told}, {LEAST_BANDWIDTH:g} asked"
        )
    else:
        record["notes"].append(f"bandwidth: {told}; its limit is for GPUs, not on a CPU")
    record["headline"] = f"{comm.get_world_size()} ranks, all-reduce {told}"
    restarts = _requeue(record, args.output)
    record["state"] = "PASS" if all(c["passed"] for c in record["checks"]) else "FAIL"
    if first:
        with atomic_path(args.output / FILE) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    comm.synchronize()
    if restarts == 0:
        raise SystemExit(EXIT_UNFINISHED)


def results(output: Path) -> dict[str, Any]:
    """What `main` has written, by name."""
    return {"nodes": json.loads((output / FILE).read_text())}


def _check(record: dict, name: str, passed: bool, told: object) -> None:
    record["checks"].append({"name": name, "passed": passed, "told": str(told)})


def _bandwidth(device: torch.device) -> dict[int, dict[str, Any]]:
    """By bytes of a message: bytes over the slowest link a second, and whether the sum is right."""
    world, gpu = comm.get_world_size(), device.type == "cuda"
    found: dict[int, dict[str, Any]] = {}
    for power in range(10, 29 if gpu else 21, 3):
        size = 1 << power
        message = torch.ones(size // 4, device=device)
        dist.all_reduce(message)  # builds connections
        right = bool((message == world).all())
        comm.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            dist.all_reduce(message)
        if gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / 5
        moved = 2 * (world - 1) / world * size  # of a ring, by each rank
        found[size] = {"gb_per_s": moved / seconds / 1e9, "right": right}
    return found


def _requeue(record: dict, output: Path) -> int | None:
    """How often Slurm has started the job again; 0: it is asked to. None: there is no job."""
    marker = os.environ.get(MARKER_VARIABLE)
    if not marker:
        record["notes"].append("a requeue: not without a job of tools/launch_slurm.py")
        return None
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts == 0:
        _check(record, "requeued", False, "not yet: Slurm has not started the job again")
        if comm.is_main_process():
            content = {"iteration": 0, "max_iter": 1, "reason": "check_gpu.py asks for it once"}
            content |= {"requeue": True, "checkpoint": "", "time": time.time()}
            with atomic_path(marker) as temporary:
                temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    else:
        _check(record, "requeued", (output / FILE).is_file(), f"{restarts} times")
    return restarts
