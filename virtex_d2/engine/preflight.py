"""Whether the processes of a run fit together, looked at before they compute anything."""

import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.topology import Place

# The project's own packages, where the tool has imported them.
PACKAGES = ("virtex_d2", "pretrain")

# Seconds. NFS clients may keep for 60 that a file does not exist (nfs(5): acdirmax).
VISIBLE_WITHIN = 75.0


def identity(place: Place) -> dict[str, Any]:
    """What a process says of itself, for `check_records` and for the log."""
    gpu = None if place.gpu is None else torch.cuda.get_device_properties(place.gpu)
    return {
        "name": place.name,
        "host": place.host,
        "node": place.node,
        "process": (_pid_namespace(), os.getpid()),
        "local_rank": place.local_rank,
        "gpu": None if gpu is None else f"{place.gpu} ({gpu.name})",
        "gpu_id": str(getattr(gpu, "uuid", "")),  # whatever number it is seen under
        "versions": versions(),
        "code": code(),
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
        if (record["gpu"] is None) != (first["gpu"] is None):
            without, other = (record, first) if record["gpu"] is None else (first, record)
            raise InputError(
                f"{without['name']} has no GPU to use, {other['name']} has one. Check nvidia-smi "
                "there, or use MODEL.DEVICE cpu."
            )
        if found := _differing(first["versions"], record["versions"]):
            told = ", ".join(
                f"{name} {record['versions'].get(name, 'absent')} instead of "
                f"{first['versions'].get(name, 'absent')}"
                for name in found
            )
            raise InputError(
                f"{record['name']} has other versions than {first['name']}: {told}. Use one "
                "environment for all."
            )
        if found := _differing(first["code"], record["code"]):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError(
                f"{record['name']} runs other code than {first['name']}: {', '.join(found[:3])}"
                f"{more} differ. Start all from one folder that the machines share, or bring their "
                "copies to one version."
            )


def _differing(first: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))


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
    hashes = {}
    for name in PACKAGES:
        if name not in sys.modules:
            continue
        folder = Path(sys.modules[name].__file__).parent
        for path in sorted(folder.rglob("*.py")):
            relative = f"{name}/{path.relative_to(folder).as_posix()}"
            hashes[relative] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return hashes


def code_version() -> str:
    """All of `code` in twelve digits."""
    return hashlib.sha256(repr(sorted(code().items())).encode()).hexdigest()[:12]


def check_collectives(gpu: int | None) -> float:
    """Add up a number over all processes, where models will, and compare with what it must be.

    Returns:
        Seconds that the second time took: the first builds connections.
    """
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    rank, world_size = comm.get_rank(), comm.get_world_size()
    expected = world_size * (world_size + 1) // 2
    for _ in range(2):
        start = time.perf_counter()
        value = torch.full((1024,), rank + 1, dtype=torch.int64, device=device)
        dist.all_reduce(value)
        found = value.unique().tolist()
        if found != [expected]:
            raise InputError(
                f"the sum of 1 to {world_size} over all processes is {expected}, found {found}: "
                "communication between the machines gives wrong results. NCCL_P2P_DISABLE=1 or "
                "NCCL_IB_DISABLE=1 may tell which way of it."
            )
    return time.perf_counter() - start


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
    problems = comm.all_gather(problem)
    if comm.is_main_process():
        path.unlink(missing_ok=True)
    hosts = comm.all_gather(os.environ.get("SLURMD_NODENAME") or platform.node())
    told = [f"rank {rank} on {hosts[rank]}: {text}" for rank, text in enumerate(problems) if text]
    if told:
        more = f"; and {len(told) - 4} more" if len(told) > 4 else ""
        raise InputError(
            f"OUTPUT_DIR {folder}: {'; '.join(told[:4])}{more}. It must be one folder on a file "
            f"system that all machines share with {hosts[0]}, and writable for all."
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
