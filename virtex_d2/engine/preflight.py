"""Whether the processes of a run fit together, looked at before they compute anything."""

import functools
import hashlib
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.rendezvous import Records
from virtex_d2.engine.topology import Topology

# The project's own packages, where the tool has imported them.
PACKAGES = ("virtex_d2", "pretrain")

# Seconds. Nothing in training reads the clock; time budgets, logs and TLS do. Five minutes is what
# Kerberos, and with it many clusters' file systems, tolerates.
SKEW_WARNING, SKEW_ERROR = 5.0, 300.0

# Seconds. NFS clients may keep for 60 that a file does not exist (nfs(5): acdirmax).
VISIBLE_WITHIN = 75.0


def identity(topology: Topology) -> dict[str, Any]:
    """What a process says of itself for `check_records`; JSON."""
    return {
        "host": topology.host,
        "node": topology.node,
        "local_rank": topology.local_rank,
        "world_size": topology.world_size,
        "pid": os.getpid(),
        "gpu": _gpu(topology.gpu),
        "_gpu_id": _gpu_id(topology.gpu),
        "_versions": versions(),
        "_code": code(),
    }


def check_records(records: Records) -> None:
    """Compare each process that has come with the first that is there."""
    reference = records[min(records)]
    first = _name(min(records), reference)
    places: dict[tuple, str] = {}
    for rank, record in sorted(records.items()):
        name = _name(rank, record)
        if record["world_size"] != reference["world_size"]:
            raise InputError(
                f"{name} was started as one of {record['world_size']} processes, {first} as one of "
                f"{reference['world_size']}. Start all with the same sizes."
            )
        for place, what in (
            (("local rank", record["node"], record["local_rank"]), "are the same local rank of"),
            (("gpu", record["host"], record["_gpu_id"]), "use the same GPU of"),
        ):
            if place[-1] is not None and place in places:
                raise InputError(
                    f"{places[place]} and {name} {what} one machine. Start one process for each of "
                    "its GPUs, and give each its own LOCAL_RANK."
                )
            places[place] = name
        if (record["gpu"] is None) != (reference["gpu"] is None):
            without, with_one = (name, first) if record["gpu"] is None else (first, name)
            raise InputError(
                f"{without} has no GPU to use, {with_one} has one. Check nvidia-smi there, or use "
                "MODEL.DEVICE cpu."
            )
        differing = [
            f"{package} {record['_versions'].get(package, 'absent')} instead of {version}"
            for package, version in reference["_versions"].items()
            if record["_versions"].get(package) != version
        ]
        if differing:
            raise InputError(
                f"{name} has other versions than {first}: {', '.join(differing)}. Use one "
                "environment for all."
            )
        _check_code(name, record["_code"], first, reference["_code"])


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
            content = path.read_bytes()
            relative = f"{name}/{path.relative_to(folder).as_posix()}"
            hashes[relative] = hashlib.sha256(content).hexdigest()[:12]
    return hashes


def code_version() -> str:
    """All of `code` in twelve digits."""
    return hashlib.sha256(repr(sorted(code().items())).encode()).hexdigest()[:12]


def check_interfaces(environment: Mapping[str, str], on_gpu: bool) -> None:
    """Look whether the network interfaces that are to be used are there.

    gloo takes names. NCCL takes beginnings of names, whole ones behind "=", and behind "^" those
    that it is to leave out, which need not be there.
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


def check_collectives(topology: Topology, group: Any) -> float:
    """Add up a number over all processes, where models will, and compare with what it must be.

    Args:
        topology: of this process.
        group: of all processes, for what is on CPUs.

    Returns:
        Seconds that the second time took: the first builds connections.
    """
    device = "cpu" if topology.gpu is None else f"cuda:{topology.gpu}"
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
    dist.barrier(group)
    return time.perf_counter() - start


def clock_skew(group: Any, names: list[str], rounds: int = 5) -> tuple[float, str]:
    """Compare the clocks of all processes.

    Args:
        group: of all processes, on CPUs.
        names: of each rank.
        rounds: comparisons, of which each process's median counts: some are late to look.

    Returns:
        The largest difference in seconds, and a warning or "".
    """
    times = []
    for _ in range(rounds):
        dist.barrier(group)
        times.append(time.time())
    every = comm.all_gather(times, group)
    ahead = [statistics.median(t - t0 for t, t0 in zip(mine, every[0])) for mine in every]
    first, last = ahead.index(min(ahead)), ahead.index(max(ahead))
    skew = ahead[last] - ahead[first]
    told = f"the clock of {names[last]} is {skew:.1f} s ahead of that of {names[first]}"
    if skew > SKEW_ERROR:
        raise InputError(f"{told}. Set them (chronyc tracking, timedatectl) and start again.")
    return skew, f"{told}: times in logs do not compare." if skew > SKEW_WARNING else ""


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


def _check_code(name: str, mine: dict[str, str], first: str, reference: dict[str, str]) -> None:
    if mine == reference:
        return
    differing = sorted(
        path for path in mine.keys() | reference.keys() if mine.get(path) != reference.get(path)
    )
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise InputError(
        f"{name} runs other code than {first}: {', '.join(differing[:3])}{more} differ. Start all "
        "from one folder that the machines share, or bring their copies to one version."
    )


def _name(rank: int, record: dict[str, Any]) -> str:
    return f"rank {rank} on {record['host']}"


def _gpu(index: int | None) -> str | None:
    return None if index is None else f"{index} ({torch.cuda.get_device_name(index)})"


def _gpu_id(index: int | None) -> str | None:
    """What is the GPU's own whatever number it is seen under; torch knows it from 2.4 on."""
    if index is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return str(uuid) if uuid is not None else None
