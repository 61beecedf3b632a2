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
    """The place of this process in the run.

    Attributes:
        launcher: what has told it, in words for the log.
        host, node: name and number of this machine. Where nothing tells the number, it is the rank
            of the machine's first process.
        rank, world_size, local_rank: of this process; where it starts others, of the first of them.
        gpu: index of its CUDA device, or None on a CPU.
        start: how many processes this one starts, instead of being one of the run's itself.
        address, port: where all meet. Port 0 is any that is free, for processes of one machine.
        serves: whether this process opens that meeting place.
        attempt: tells the keys of this start from those of earlier ones in the same meeting place.
        note: something that the user may want to know, or "".
    """

    launcher: str
    host: str
    node: int = 0
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    gpu: int | None = None
    start: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    serves: bool = False
    attempt: str = "0"
    note: str = ""

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


@dataclass(frozen=True)
class _Flags:
    """Those of `engine.cli.argument_parser` that are about processes; 0 where not given."""

    per_machine: int
    name: str  # of the flag that gave it
    machines: int
    machine_rank: int
    dist_url: str

    @classmethod
    def of(cls, args: argparse.Namespace) -> "_Flags":
        gpus = getattr(args, "num_gpus", None)
        processes = getattr(args, "num_processes", None)
        machines = getattr(args, "num_machines", 1)
        machine_rank = getattr(args, "machine_rank", 0)
        for flag, value, least in (
            ("--num-gpus", gpus, 0),
            ("--num-processes", processes, 1),
            ("--num-machines", machines, 1),
            ("--machine-rank", machine_rank, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{flag} {value}: expected at least {least}.")
        if gpus and processes and gpus != processes:
            raise InputError(
                f"--num-gpus {gpus} --num-processes {processes}: each process has one GPU; give "
                "one of the two flags."
            )
        if machine_rank >= machines:
            raise InputError(
                f"--machine-rank {machine_rank} of --num-machines {machines}: machines count from "
                "0."
            )
        name = "--num-processes" if processes else "--num-gpus"
        url = getattr(args, "dist_url", "auto")
        return cls(processes or gpus or 0, name, machines, machine_rank, url)

    def refuse_other_sizes(self, launcher: str, per_machine: int | None, machines: int | None):
        """Raise InputError if they ask for other numbers than the launcher's."""
        for flag, asked, found, what in (
            (self.name, self.per_machine, per_machine, "processes on this machine"),
            ("--num-machines", self.machines if self.machines > 1 else 0, machines, "machines"),
        ):
            if asked and asked != (found or 1):
                raise InputError(
                    f"{flag} {asked}: {launcher} has started {found or 'an unknown number of'} "
                    f"{what}. Leave the flag out: sizes come from the launcher."
                )

    def require_gpus(self, machine: Machine) -> None:
        asked = self.per_machine
        short = machine.gpus < asked and (machine.gpus or self.name == "--num-gpus")
        if asked > 1 and short:
            raise InputError(
                f"{self.name} {asked}: {machine.host} shows {machine.gpus} CUDA devices, and each "
                "process needs one. For several processes on CPUs use --num-processes and "
                "MODEL.DEVICE cpu."
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
    flags = _Flags.of(args)
    tasks = tasks_of_step(environment, machine.pid)
    ranked = "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE") > 1
    if ranked and ("TORCHELASTIC_RUN_ID" in environment or not tasks):
        return _torchrun(flags, environment, machine)
    if tasks > 1:
        found = _slurm(flags, environment, machine)
    elif flags.machines > 1 or flags.per_machine > 1:
        found = _by_flags(flags, machine)
    else:
        found = Place("one process", machine.host, note=_unused(environment, machine))
    if ranked:
        note = "RANK and WORLD_SIZE are left over from elsewhere: srun says who is who."
        return replace(found, note=note)
    return found


def tasks_of_step(environment: Mapping[str, str], pid: int | None = None) -> int:
    """The number of tasks of the srun step that this process is one of; 0: it is none.

    Batch scripts and interactive shells have variables about the job, but are no tasks of srun. The
    shell of `srun --pty` hands on what it has of its step, of which the other tasks will not come.
    """
    step = environment.get("SLURM_STEP_ID", "")
    typed = "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(
        pid or os.getpid()
    )
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP or typed:
        return 0
    # SLURM_NTASKS may still be the job's in a step with a number of its own.
    own = "SLURM_STEP_NUM_TASKS" in environment
    return _number(environment, "SLURM_STEP_NUM_TASKS" if own else "SLURM_NTASKS")


def _slurm(flags: _Flags, environment: Mapping[str, str], machine: Machine) -> Place:
    tasks = tasks_of_step(environment, machine.pid)
    nodes, task, local_task, node = (
        _number(environment, f"SLURM_{name}")
        for name in ("STEP_NUM_NODES", "PROCID", "LOCALID", "NODEID")
    )
    if not (task < tasks and node < nodes <= tasks and local_task <= task):
        raise InputError(
            f"environment: Slurm's variables contradict each other: {tasks} tasks on {nodes} "
            f"nodes, SLURM_PROCID {task}, SLURM_NODEID {node}, SLURM_LOCALID {local_task}. Were "
            "some of them set by hand, or exported into another job?"
        )
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    # A job's first steps and those of the next jobs, with which it may share a node, differ.
    address = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    port = PORTS[(job * 47 + step) % len(PORTS)]
    if flags.dist_url != "auto":
        address, port = _meeting_place(flags.dist_url)
    place = Place(
        "srun, one task per node",
        environment.get("SLURMD_NODENAME") or machine.host,
        node=node,
        gpu=0 if machine.gpus else None,
        address=address,
        port=port,
        serves=task == 0,
    )
    if tasks == nodes:
        flags.refuse_other_sizes("srun", flags.per_machine, nodes)
        flags.require_gpus(machine)
        return _with_processes(place, flags.per_machine or machine.gpus or 1, nodes)
    flags.refuse_other_sizes("srun", tasks // nodes, nodes)
    # With --gpus-per-task=1 each task sees its own GPU as the first and only one.
    bound = machine.gpus == 1
    if machine.gpus and local_task >= machine.gpus and not bound:
        raise InputError(
            f"environment: SLURM_LOCALID {local_task} has no GPU of its own: {place.host} shows "
            f"{machine.gpus} to it. Start as many tasks a node as it has GPUs (srun "
            "--ntasks-per-node), or add MODEL.DEVICE cpu."
        )
    return replace(
        place,
        launcher="srun, one task per GPU" if machine.gpus else "srun, one task per process",
        rank=task,
        world_size=tasks,
        local_rank=local_task,
        gpu=(0 if bound else local_task) if machine.gpus else None,
    )


def _torchrun(flags: _Flags, environment: Mapping[str, str], machine: Machine) -> Place:
    rank, world_size, local_rank = (
        _number(environment, key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(key):
            raise InputError(f"environment: WORLD_SIZE is {world_size} but {key} is not set.")
    local_size, machines = (
        _number(environment, key) if key in environment else None
        for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    for name, value, size in (("", rank, world_size), ("LOCAL_", local_rank, local_size)):
        if size is not None and value >= size:
            raise InputError(
                f"environment: {name}RANK is {value} of {name}WORLD_SIZE {size}; ranks count from "
                "0."
            )
    flags.refuse_other_sizes("torchrun", local_size, machines)
    if flags.dist_url != "auto":
        raise InputError(
            f"--dist-url {flags.dist_url}: processes that torchrun has started meet at MASTER_ADDR "
            "and MASTER_PORT. Leave the flag out; torchrun has --master-addr and --master-port."
        )
    if machine.gpus and local_rank >= machine.gpus:
        raise InputError(
            f"environment: LOCAL_RANK {local_rank} has no GPU of its own: this machine shows "
            f"{machine.gpus}. Start fewer processes, or add MODEL.DEVICE cpu."
        )
    numbered = "GROUP_RANK" in environment
    return Place(
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE",
        environment.get("SLURMD_NODENAME") or machine.host,
        node=_number(environment, "GROUP_RANK") if numbered else rank - local_rank,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        gpu=local_rank if machine.gpus else None,
        address=environment["MASTER_ADDR"],
        port=_port(environment["MASTER_PORT"], "MASTER_PORT"),
        # torchrun keeps a meeting place of its own open at that address; others do not.
        serves=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _by_flags(flags: _Flags, machine: Machine) -> Place:
    """Of detectron2's flags, the command being given on every machine."""
    flags.require_gpus(machine)
    several = flags.machines > 1
    if several and flags.dist_url == "auto":
        raise InputError("--dist-url auto works on one machine; give tcp://HOST:PORT of the first.")
    address, port = ("127.0.0.1", 0)
    if flags.dist_url != "auto":
        address, port = _meeting_place(flags.dist_url)
    place = Place(
        f"--num-machines {flags.machines}" if several else f"{flags.name} {flags.per_machine}",
        machine.host,
        node=flags.machine_rank,
        gpu=0 if machine.gpus else None,
        address=address,
        port=port,
        serves=flags.machine_rank == 0,
    )
    return _with_processes(place, flags.per_machine or 1, flags.machines)


def _with_processes(place: Place, processes: int, machines: int) -> Place:
    """The place with so many processes on each machine; one needs not be started."""
    return replace(
        place,
        rank=place.node * processes,
        world_size=machines * processes,
        start=processes if processes > 1 else 0,
    )


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


def _first_host(nodelist: str) -> str:
    """The first name of one of Slurm's lists, such as gpu01 of "gpu[01-03,7],login"."""
    first = re.match(r"(?:[^,\[\]]|\[\d[^\[\]]*\])+(?=,|$)", nodelist)
    if not first:
        raise InputError(
            f"environment: SLURM_STEP_NODELIST is '{nodelist}'; expected a list of hosts such as "
            "node[1-2]. Was the environment cleared under srun?"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _meeting_place(url: str) -> tuple[str, int]:
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/]+):(\d+)/?", url)
    if not match:
        raise InputError(f"--dist-url {url}: expected tcp://HOST:PORT, such as tcp://node1:29500.")
    return match[1].strip("[]"), _port(match[2], f"--dist-url {url}")


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
