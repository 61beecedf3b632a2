"""Who is who in a run: how many processes on which machines, and where they meet.

`resolve` is a function of the flags, the environment and this machine; it starts and asks nothing.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.slurm_step import SlurmStep, expand_hosts, find_step, is_in_step


@dataclass(frozen=True)
class Machine:
    """What there is to know about the machine that this process is on.

    Attributes:
        host: its name.
        gpus: CUDA devices that this process sees; 0 where the run is to use the CPU.
        expand: names of the hosts in one of Slurm's lists.
        pid: of this process.
    """

    host: str
    gpus: int
    expand: Callable[[str], list[str]] = expand_hosts
    pid: int = 0


@dataclass(frozen=True)
class Topology:
    """The place of this process in the run.

    Attributes:
        launcher: how it was told, in words for the log.
        host: name of this machine.
        node: number of this machine. Where the launcher does not tell, the rank of the machine's
            first process.
        nodes: how many machines; None where the launcher does not tell.
        spawn: how many processes this one must account for: those of its machine, which have to
            agree on their ranks first. 0: it is one of the run's processes itself.
        rank, world_size, local_rank: of this process; None as long as `spawn` is not 0.
        gpu: index of its CUDA device, or None on a CPU.
        address, port: where all meet. Port 0 is any that is free, for processes of one machine.
        serves: whether this process opens that meeting place.
        run_id: tells this run from others that use the same meeting place.
        expected: names of machines with how many processes each should have, where that is known.
        note: something that the user may want to know, or "".
    """

    launcher: str
    host: str
    node: int = 0
    nodes: int | None = 1
    spawn: int = 0
    rank: int | None = 0
    world_size: int | None = 1
    local_rank: int | None = 0
    gpu: int | None = None
    address: str = "127.0.0.1"
    port: int = 0
    serves: bool = True
    run_id: str = "run"
    expected: tuple[tuple[str, int], ...] = ()
    note: str = ""

    def process(self, machines: list[tuple[str, int]], local_rank: int) -> "Topology":
        """The place of a process that this one accounts for.

        Args:
            machines: the name of each, and how many processes it has.
            local_rank: its number on this machine.
        """
        counts = [count for _, count in machines]
        return replace(
            self,
            spawn=0,
            rank=sum(counts[: self.node]) + local_rank,
            world_size=sum(counts),
            local_rank=local_rank,
            gpu=None if self.gpu is None else local_rank,
            serves=False,
            expected=tuple(machines),
        )


@dataclass(frozen=True)
class _Flags:
    """Those of `runtime.setup.argument_parser` that are about processes; 0 where not given."""

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
        return cls(
            processes or gpus or 0,
            "--num-processes" if processes else "--num-gpus",
            machines,
            machine_rank,
            getattr(args, "dist_url", "auto"),
        )

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


def resolve(args: argparse.Namespace, environment: Mapping[str, str], machine: Machine) -> Topology:
    """Find this process's place. The first that applies:

    1. RANK and WORLD_SIZE above 1: torchrun, or whoever sets its variables; in a step of srun
       torchrun alone, as Slurm's own numbers are of this run, and others may be left over.
    2. `--num-machines` above 1: detectron2's flags, the command being given on every machine.
    3. A Slurm step of several tasks. Where a node has several, each task is a process; where each
       node has one, it starts its machine's: `--num-processes`, `--num-gpus`, or one per GPU.
    4. `--num-processes` or `--num-gpus` above 1: so many processes of this machine.
    5. One process.
    """
    flags = _Flags.of(args)
    ranked = "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE") > 1
    if ranked and ("TORCHELASTIC_RUN_ID" in environment or not is_in_step(environment)):
        return _torchrun(flags, environment, machine)
    step = find_step(environment, machine.expand)
    # A shell of `srun --pty` hands on what it has of its step: only srun's own child is a task.
    task = environment.get("SLURM_TASK_PID")
    typed = "SLURM_PTY_PORT" in environment and task != str(machine.pid)
    if ranked and typed and step is None:
        return _torchrun(flags, environment, machine)
    if ranked:
        others = {key: value for key, value in environment.items() if key != "WORLD_SIZE"}
        note = "RANK and WORLD_SIZE are left over from elsewhere: srun says who is who."
        return replace(resolve(args, others, machine), note=note)
    if flags.machines > 1:
        return _several_machines(flags, step, machine)
    if step is not None and typed and not flags.per_machine:
        raise InputError(
            f"this is task {step.task} of a step of {step.tasks}, in the shell of srun --pty "
            "(SLURM_PTY_PORT is set), so that the others would not come. Start all tasks with srun "
            "from salloc's shell, or here the processes of this machine with torchrun or "
            "--num-processes. (Where a script of srun's own has started this: unset "
            "SLURM_PTY_PORT in it.)"
        )
    if step is not None and not typed:
        return _slurm(flags, step, machine)
    if flags.per_machine > 1:
        _require_gpus(machine, flags)
        local = flags.dist_url == "auto"
        address, port = ("127.0.0.1", 0) if local else _meeting_place(flags.dist_url)
        return Topology(
            address=address,
            port=port,
            launcher=f"{flags.name} {flags.per_machine}",
            host=machine.host,
            spawn=flags.per_machine,
            rank=None,
            world_size=None,
            local_rank=None,
            gpu=0 if machine.gpus else None,
        )
    return Topology(launcher="one process", host=machine.host, note=_unused(environment, machine))


def _torchrun(flags: _Flags, environment: Mapping[str, str], machine: Machine) -> Topology:
    rank, world_size, local_rank = (
        _number(environment, key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(key):
            raise InputError(f"environment: WORLD_SIZE is {world_size} but {key} is not set.")
    if rank >= world_size:
        raise InputError(
            f"environment: RANK is {rank} of WORLD_SIZE {world_size}; ranks count from 0."
        )
    local_size = machines = None
    if "LOCAL_WORLD_SIZE" in environment:
        local_size = _number(environment, "LOCAL_WORLD_SIZE")
        if local_rank >= local_size:
            raise InputError(
                f"environment: LOCAL_RANK is {local_rank} of LOCAL_WORLD_SIZE {local_size}; local "
                "ranks count from 0."
            )
    if "GROUP_WORLD_SIZE" in environment:
        machines = _number(environment, "GROUP_WORLD_SIZE")
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
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Topology(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE",
        host=environment.get("SLURMD_NODENAME") or machine.host,
        node=_number(environment, "GROUP_RANK")
        if "GROUP_RANK" in environment
        else rank - local_rank,
        nodes=machines,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        gpu=local_rank if machine.gpus else None,
        address=environment["MASTER_ADDR"],
        port=_port(environment["MASTER_PORT"], "MASTER_PORT"),
        # torchrun keeps a meeting place of its own open at that address; others do not.
        serves=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        run_id=f"{environment.get('TORCHELASTIC_RUN_ID', 'run')}.{attempt}",
    )


def _several_machines(flags: _Flags, step: SlurmStep | None, machine: Machine) -> Topology:
    if flags.dist_url == "auto":
        raise InputError("--dist-url auto works on one machine; give tcp://HOST:PORT of the first.")
    if step is not None and max(step.tasks_of_nodes) > 1:
        raise InputError(
            f"--num-machines {flags.machines}: each of the tasks that srun started "
            f"({step.tasks_of_nodes[step.node]} on this node) would start a machine's processes. "
            "Leave detectron2's flags out, or start one task a node (srun --ntasks-per-node=1)."
        )
    _require_gpus(machine, flags)
    address, port = _meeting_place(flags.dist_url)
    return Topology(
        launcher=f"--num-machines {flags.machines}",
        host=machine.host,
        node=flags.machine_rank,
        nodes=flags.machines,
        spawn=flags.per_machine or 1,
        rank=None,
        world_size=None,
        local_rank=None,
        gpu=0 if machine.gpus else None,
        address=address,
        port=port,
        serves=flags.machine_rank == 0,
    )


def _slurm(flags: _Flags, step: SlurmStep, machine: Machine) -> Topology:
    address, port = step.nodes[0], step.port
    if flags.dist_url != "auto":
        address, port = _meeting_place(flags.dist_url)
    common = Topology(
        launcher="srun, one task per node",
        host=step.nodes[step.node],
        node=step.node,
        nodes=len(step.nodes),
        address=address,
        port=port,
        serves=step.task == 0,
        run_id=f"{step.job}.{step.step}.{step.restarts}",
        expected=tuple(zip(step.nodes, step.tasks_of_nodes)),
    )
    if max(step.tasks_of_nodes) == 1:
        _require_gpus(machine, flags)
        return replace(
            common,
            spawn=flags.per_machine or machine.gpus or 1,
            rank=None,
            world_size=None,
            local_rank=None,
            gpu=0 if machine.gpus else None,
        )
    here = step.tasks_of_nodes[step.node]
    flags.refuse_other_sizes("srun", here, len(step.nodes))
    # With --gpus-per-task=1 each task sees its own GPU as the first and only one.
    bound = machine.gpus == 1
    if machine.gpus and step.local_task >= machine.gpus and not bound:
        raise InputError(
            f"environment: SLURM_LOCALID {step.local_task} has no GPU of its own: {common.host} "
            f"shows {machine.gpus} to it, and has {here} tasks. Start as many tasks a node as it "
            "has GPUs (srun --ntasks-per-node), or add MODEL.DEVICE cpu."
        )
    index = 0 if bound else step.local_task
    return replace(
        common,
        launcher="srun, one task per GPU" if machine.gpus else "srun, one task per process",
        rank=step.task,
        world_size=step.tasks,
        local_rank=step.local_task,
        gpu=index if machine.gpus else None,
    )


def _require_gpus(machine: Machine, flags: _Flags) -> None:
    asked = flags.per_machine
    if asked > 1 and flags.name == "--num-gpus" and not machine.gpus:
        raise InputError(
            f"--num-gpus {asked}: {machine.host} shows 0 CUDA devices. For several processes on "
            "CPUs use --num-processes (with MODEL.DEVICE cpu where there are GPUs)."
        )
    if machine.gpus and asked > machine.gpus:
        raise InputError(
            f"{flags.name} {asked}: {machine.host} shows {machine.gpus} CUDA devices, and each "
            "process needs one. For several processes on CPUs use --num-processes and MODEL.DEVICE "
            "cpu."
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
            "WORLD_SIZE and LOCAL_RANK; where srun starts the processes, unset all three."
        )
    return int(value)
