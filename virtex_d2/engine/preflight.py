"""Whether the processes of a run fit together, looked at before they compute anything."""

import functools
import hashlib
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.topology import Place

# The project's own packages, where the tool has imported them.
PACKAGES = ("virtex_d2", "pretrain")

# Seconds. NFS clients may keep for 60 that a file does not exist (nfs(5): acdirmax).
VISIBLE_WITHIN = 75.0


def identity(place: Place) -> dict[str, Any]:
    """What a process says of itself, for `check_records` and for the log."""
    gpu = None if place.gpu is None else torch.cuda.get_device_properties(place.gpu)
    device = "the CPU" if gpu is None else f"GPU {place.gpu} ({gpu.name})"
    return {
        "name": place.name,
        "host": place.host,
        "node": place.node,
        "local_rank": place.local_rank,
        "device": device,
        "gpu_id": str(getattr(gpu, "uuid", "")),  # whatever number it is seen under
        "process": (_pid_namespace(), os.getpid()),
        "same": {"device": "CPU" if gpu is None else "GPU", **versions(), **code()},
    }


def check_records(records: Sequence[dict[str, Any]]) -> None:
    """Compare what each rank says of itself with the first one's, and with each other."""
    first = records[0]
    places: dict[tuple, str] = {}
    for record in records:
        for place, what in (
            (("local rank", record["node"], record["local_rank"]), "are the same local rank of"),
            (("gpu", record["host"], record["gpu_id"]), "use the same GPU of"),
        ):
            if place[-1] != "" and place in places:
                raise InputError(
                    f"{places[place]} and {record['name']} {what} one machine. Start one process "
                    "for each of its GPUs, and give each its own LOCAL_RANK."
                )
            places[place] = record["name"]
        expected, found = first["same"], record["same"]
        differing = [
            f"{key} {found.get(key, 'absent')} instead of {expected.get(key, 'absent')}"
            for key in expected | found
            if found.get(key) != expected.get(key)
        ]
        if differing:
            raise InputError(
                f"{record['name']} differs from {first['name']}: {some(differing, 3)}. "
                "Use one environment and one copy of the code for all; where a GPU is missing, see "
                "nvidia-smi there, or use MODEL.DEVICE cpu."
            )


@functools.cache
def versions() -> dict[str, str]:
    """What has to be the same in all processes, and how to call it."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("torchvision", "detectron2", "fvcore", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(name)  # on the path without having been installed
            found[name] = str(getattr(module, "__version__", "unknown"))
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


@functools.cache
def code() -> dict[str, str]:
    """A short hash of each of this project's source files, by its path in its package."""
    loaded = [sys.modules[name] for name in PACKAGES if name in sys.modules]
    return {
        str(path.relative_to(folder.parent)): _hash(path.read_bytes())
        for folder in (Path(module.__file__).parent for module in loaded)
        for path in sorted(folder.rglob("*.py"))
    }


def code_version() -> str:
    """All of `code` in twelve digits."""
    return _hash(repr(sorted(code().items())).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def check_interfaces(environment: Mapping[str, str], on_gpu: bool) -> None:
    """Compare the network interfaces that variables name with those of this machine.

    Args:
        on_gpu: whether NCCL, which has a variable of its own, is used beside gloo.
    """
    there = [name for _, name in socket.if_nameindex()]
    gloo, nccl = (environment.get(f"{name}_SOCKET_IFNAME", "") for name in ("GLOO", "NCCL"))
    hint = " (gloo takes names alone, NCCL_SOCKET_IFNAME knows ^)" if "^" in gloo else ""
    absent = {f"GLOO_SOCKET_IFNAME={gloo}{hint}": set(filter(None, gloo.split(","))) - set(there)}
    wanted = [name for name in nccl.lstrip("^=").split(",") if name]
    if on_gpu and wanted:
        whole = "=" in nccl[:2]
        found = {n for n in there for w in wanted if (n == w if whole else n.startswith(w))}
        left = set(there) - found if nccl.startswith("^") else found
        absent[f"NCCL_SOCKET_IFNAME={nccl}"] = set() if left else set(wanted)
    for variable, names in absent.items():
        if names:
            raise InputError(
                f"{variable}: this machine has no interface {', '.join(sorted(names))}, but "
                f"{', '.join(there)}. Name one of these, or unset the variable."
            )


def check_collectives(gpu: int | None) -> None:
    """Add up a number over all processes, where models will, and compare with what it must be."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    expected = world_size * (world_size + 1) // 2
    value = torch.tensor(rank + 1, device="cpu" if gpu is None else f"cuda:{gpu}")
    dist.all_reduce(value)
    if value.item() != expected:
        raise InputError(
            f"the sum of 1 to {world_size} over all processes is {expected}, found {value.item()}: "
            "communication between the machines gives wrong results. NCCL_P2P_DISABLE=1 or "
            "NCCL_IB_DISABLE=1 may tell which way of it."
        )


def check_shared(folder: str) -> None:
    """Check that all processes see the same folder, and may write there.

    Collective; the folder exists in the first process.
    """
    if comm.get_world_size() == 1:
        return
    # No other name could have been seen before: NFS remembers also what was not there.
    token = comm.all_gather(os.urandom(8).hex())[0]
    path = Path(folder) / f".tmp-seen-by-all-{token}"
    problem = ""
    if comm.is_main_process():
        try:
            path.touch()
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
    comm.synchronize()
    if not comm.is_main_process():
        problem = _look_for(path)
    host = os.environ.get("SLURMD_NODENAME") or platform.node()
    told = comm.all_gather(problem and f"rank {comm.get_rank()} on {host}: {problem}")
    if comm.is_main_process():
        path.unlink(missing_ok=True)
    if told := list(filter(None, told)):
        raise InputError(
            f"OUTPUT_DIR {folder}: {some(told, 4, '; ')}. It must be one folder on a file "
            "system that all machines share, and writable for all."
        )


def _look_for(path: Path) -> str:
    deadline = time.monotonic() + VISIBLE_WITHIN
    while True:
        try:
            names = os.listdir(path.parent)  # asks the server, where a look at the file may not
        except OSError as error:
            names, reason = [], f"cannot be read: {error.strerror}"
        else:
            reason = "does not hold what rank 0 has written there"
        if path.name in names:
            return "" if os.access(path.parent, os.W_OK) else "is not writable"
        if time.monotonic() > deadline:
            return reason
        time.sleep(0.2)


def _pid_namespace() -> str:
    """In which this process's id counts; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
