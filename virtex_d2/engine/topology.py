"""Who is who in a run: how many processes on which machines, and where they meet.

`resolve` is a function of the flags, the environment and this machine; it starts and asks nothing.
"""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from virtex_d2.engine.errors import InputError

# Steps that srun did not start have ids from here on (slurm.h: SLURM_MAX_NORMAL_STEP_ID and above):
# the batch script, the shell of an interactive allocation, what a job has left behind.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

# Seconds. detectron2's own: the others wait in a collective while the first process evaluates.
COLLECTIVE_TIMEOUT = 1800
# Seconds. The nodes of a large job start minutes apart, and read Python from one file server.
LAUNCH_TIMEOUT = 600

# Below 32768, where Linux takes ports for outgoing connections from, and above the well-known ones.
PORTS = range(10_000, 30_000)


@dataclass(frozen=True)
class Machine:
    """This machine: its name, the CUDA devices that the run may use, and this process's id."""

    host: str
    gpus: int
    pid: int = 0


@dataclass(frozen=True)
class Place:
    """The place of this process in the run."""

    launcher: str  # what has told it, in words for the log
    # host, node: name and number of this machine. Where nothing tells the number, it is the rank of
    # the machine's first process
    host: str
    node: int = 0
    # rank, world_size, local_rank: of this process; where it starts others, of the first of them
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    gpu: int | None = None  # index of its CUDA device, or None on a CPU
    start: int = 0  # how many processes this one starts, instead of being one of the run's itself
    # address, port: where all meet. Port 0 is any that is free, for processes of one machine
    address: str = "127.0.0.1"
    port: int = 0
    serves: bool = False  # whether this process opens that meeting place
    # tells the keys of this start from those of earlier ones in the same meeting place
    attempt: str = "0"
    note: str = ""  # something that the user may want to know, or ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def child(self, local_rank: int) -> "Place":
        """The place of a process that this one starts."""
        return replace(
            self,
            rank=self.rank + local_rank,
            local_rank=local_rank,
            gpu=None if self.gpu is None else local_rank,
            start=0,
            serves=False,
        )


def resolve(args: argparse.Namespace, environment: Mapping[str, str], machine: Machine) -> Place:
    """Find this process's place. The first that applies:

    1. RANK and WORLD_SIZE above 1, of torchrun.
    2. A Slurm step of several tasks. Where a node has several, each task is a process; where each
       node has one, it starts its machine's: `--num-processes`, `--num-gpus`, or one per GPU.
    3. RANK and WORLD_SIZE above 1, set by hand. In a step they are left over from elsewhere.
    4. `--num-machines`, `--num-gpus`, `--num-processes`: so many processes of each machine.
    5. One process.
    """
    flag, asked, machines, url = _flags(args)
    tasks = tasks_of_step(environment, machine.pid)
    ranked = "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE") > 1
    here, start = None, 0  # processes of this machine; those that this one starts
    if ranked and ("TORCHELASTIC_RUN_ID" in environment or not tasks):
        place, here, nodes = _of_variables(environment, machine)
        if url != "auto":
            raise InputError(
                f"--dist-url {url}: processes that torchrun has started meet at MASTER_ADDR and "
                "MASTER_PORT. Leave the flag out; torchrun has --master-addr and --master-port."
            )
        ranked = False
    elif tasks > 1:
        place, nodes = _of_step(environment, machine, tasks)
        here = tasks // nodes
        start = (asked or machine.gpus or 1) if tasks == nodes else 0
    else:
        if _tasks(environment) > 1 and not asked and machines == 1:  # in the shell of srun --pty
            raise InputError(
                f"this is task {environment.get('SLURM_PROCID')} of a step of "
                f"{_tasks(environment)}, in the shell of srun --pty (SLURM_PTY_PORT is set), so "
                "that the others would not come. Start all tasks with srun from salloc's shell, "
                "or here the processes of this machine with torchrun or --num-processes. (Where a "
                "script of srun's own has started this: unset SLURM_PTY_PORT in it.)"
            )
        rank, start, nodes = getattr(args, "machine_rank", 0), asked or 1, machines
        launcher = f"--num-machines {machines}" if machines > 1 else f"{flag} {asked}"
        place = Place(launcher, machine.host, node=rank, serves=rank == 0)
        if machines > 1 and url == "auto":
            raise InputError(
                "--dist-url auto works on one machine; give tcp://HOST:PORT of the first."
            )
    launcher = place.launcher.partition(",")[0]
    for name, given, found, what in (
        (flag, 0 if start else asked, here, "processes on this machine"),
        ("--num-machines", machines if machines > 1 else 0, nodes, "machines"),
    ):
        if given and given != found:
            raise InputError(
                f"{name} {given}: by {launcher} there are {found or 'an unknown number of'} "
                f"{what}. Leave the flag out."
            )
    if url != "auto":
        match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/]+):(\d+)/?", url)
        if not match:
            raise InputError(f"--dist-url {url}: expected tcp://HOST:PORT, as tcp://node1:29500.")
        address, port = match[1].strip("[]"), _port(match[2], f"--dist-url {url}")
        place = replace(place, address=address, port=port)
    note = "RANK and WORLD_SIZE are left over from elsewhere: srun says who is who."
    place = replace(place, note=note if ranked else "")
    if start:
        place = replace(place, rank=place.node * start, world_size=nodes * start)
        short = machine.gpus < asked and (machine.gpus or flag == "--num-gpus")
        if asked > 1 and short:
            raise InputError(
                f"{flag} {asked}: {machine.host} shows {machine.gpus} CUDA devices, and each "
                "process needs one. For several processes on CPUs use --num-processes and "
                "MODEL.DEVICE cpu."
            )
        if place.world_size == 1:
            return Place(
                "one process", machine.host, note=place.note or _unused(environment, machine)
            )
    # Where several tasks see one GPU, it is each one's own (--gpus-per-task=1).
    gpu = 0 if machine.gpus == 1 and tasks > 1 else place.local_rank
    if machine.gpus and gpu >= machine.gpus:
        raise InputError(
            f"environment: local rank {place.local_rank} has no GPU of its own: {place.host} shows "
            f"{machine.gpus}. Start as many processes as it has GPUs, or add MODEL.DEVICE cpu."
        )
    return replace(place, gpu=gpu if machine.gpus else None, start=start if start > 1 else 0)


def tasks_of_step(environment: Mapping[str, str], pid: int | None = None) -> int:
    """The number of tasks of the srun step that this process is one of; 0: it is none.

    Batch scripts and interactive shells have variables about the job, but are no tasks of srun.
    """
    return 0 if _typed(environment, pid) else _tasks(environment)


def _tasks(environment: Mapping[str, str]) -> int:
    """Of the step that the environment is of; 0 where it is of none."""
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP:
        return 0
    # SLURM_NTASKS may still be the job's in a step with a number of its own.
    of_step = "SLURM_STEP_NUM_TASKS" in environment
    return _number(environment, "SLURM_STEP_NUM_TASKS" if of_step else "SLURM_NTASKS")


def _typed(environment: Mapping[str, str], pid: int | None) -> bool:
    """Whether this was started by the shell of `srun --pty`, which hands on what it has."""
    own = environment.get("SLURM_TASK_PID") == str(pid or os.getpid())
    return "SLURM_PTY_PORT" in environment and not own


def _flags(args: argparse.Namespace) -> tuple[str, int, int, str]:
    """The flag of processes per machine, its number (0: not given), machines, and the URL."""
    names = ("num_gpus", "num_processes", "num_machines", "machine_rank")
    gpus, processes, machines, machine_rank = (getattr(args, name, None) for name in names)
    for name, value, least in zip(names, (gpus, processes, machines, machine_rank), (0, 1, 1, 0)):
        if value is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {value}: expected at least {least}.")
    if gpus and processes and gpus != processes:
        raise InputError(
            f"--num-gpus {gpus} --num-processes {processes}: each process has one GPU; give one of "
            "the two flags."
        )
    machines = machines or 1
    if (machine_rank or 0) >= machines:
        raise InputError(
            f"--machine-rank {machine_rank} of --num-machines {machines}: machines count from 0."
        )
    flag = "--num-processes" if processes else "--num-gpus"
    return flag, processes or gpus or 0, machines, getattr(args, "dist_url", "auto")


def _of_step(environment: Mapping[str, str], machine: Machine, tasks: int) -> tuple[Place, int]:
    """The place of a task of srun, and how many nodes there are."""
    task, local_task, node = (
        _number(environment, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID")
    )
    nodes = _nodes_of_step(environment)
    nodelist = environment.get("SLURM_STEP_NODELIST", "")
    # The first name, such as gpu01 of "gpu[01-03,7],login".
    first = re.match(r"(?:[^,\[\]]|\[\d[^\[\]]*\])+(?=,|$)", nodelist)
    if not (task < tasks and node < nodes <= tasks and local_task <= task and first):
        raise InputError(
            f"environment: Slurm's variables contradict each other: {tasks} tasks on {nodes} "
            f"nodes '{nodelist}', SLURM_PROCID {task}, SLURM_NODEID {node}, SLURM_LOCALID "
            f"{local_task}. Were some of them set by hand, or exported into another job?"
        )
    # A job's first steps and those of the next jobs, with which it may share a node, differ.
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    each = "GPU" if machine.gpus else "process"
    place = Place(
        f"srun, one task per {'node' if tasks == nodes else each}",
        environment.get("SLURMD_NODENAME") or machine.host,
        node=node,
        rank=task,
        world_size=tasks,
        local_rank=local_task,
        address=re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]),
        port=PORTS[(job * 47 + step) % len(PORTS)],
        serves=task == 0,
    )
    return place, nodes


def _nodes_of_step(environment: Mapping[str, str]) -> int:
    """As Slurm tells it, or as many as there are shares of the tasks: "4(x2),3" are of three."""
    shares = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if "SLURM_STEP_NUM_NODES" not in environment and shares:
        return sum(int(times or 1) for times in re.findall(r"\d+(?:\(x(\d+)\))?(?:,|$)", shares))
    return _number(environment, "SLURM_STEP_NUM_NODES")


def _of_variables(
    environment: Mapping[str, str], machine: Machine
) -> tuple[Place, int | None, int | None]:
    """The place that torchrun's variables tell; processes of this machine, and machines."""
    rank, size, local_rank = (
        _number(environment, key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    local_size, machines, group = (
        _number(environment, key) if key in environment else None
        for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK")
    )
    for name, value, limit in (("", rank, size), ("LOCAL_", local_rank, local_size)):
        if limit is not None and value >= limit:
            raise InputError(
                f"environment: {name}RANK is {value} of {name}WORLD_SIZE {limit}; ranks count from "
                "0."
            )
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(key):
            raise InputError(f"environment: WORLD_SIZE is {size} but {key} is not set.")
    place = Place(
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE",
        environment.get("SLURMD_NODENAME") or machine.host,
        node=rank - local_rank if group is None else group,
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        address=environment["MASTER_ADDR"],
        port=_port(environment["MASTER_PORT"], "MASTER_PORT"),
        # torchrun keeps a meeting place of its own open at that address; others do not.
        serves=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    return place, local_size, machines


def _unused(environment: Mapping[str, str], machine: Machine) -> str:
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        return (
            f"Slurm has {tasks} tasks for this job, but srun has not started this process: it is "
            "alone."
        )
    if machine.gpus > 1:
        return f"{machine.gpus} GPUs are visible, one is used: --num-gpus {machine.gpus} uses all."
    return ""


def _port(text: str, where: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise InputError(f"{where}: expected a port between 1 and 65535, found '{text}'.")
    return int(text)


def _number(environment: Mapping[str, str], key: str) -> int:
    value = environment.get(key, "")
    if not value.isdigit():
        raise InputError(
            f"environment: expected a number in {key}, found '{value}'. torchrun sets RANK, "
            "WORLD_SIZE and LOCAL_RANK, srun SLURM_...: was the environment changed under them?"
        )
    return int(value)
