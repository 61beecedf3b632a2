"""What Slurm's environment variables say about the step that this process is a task of."""

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from virtex_d2.engine.errors import InputError

# Steps that srun did not start have ids from here on (slurm.h: SLURM_MAX_NORMAL_STEP_ID and above):
# the batch script, the shell of an interactive allocation, what a job has left behind.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

# Below 32768, where Linux takes ports for outgoing connections from, and above the well-known ones.
PORTS = range(10_000, 30_000)


@dataclass(frozen=True)
class SlurmStep:
    """A task's place in its step.

    Attributes:
        job, step, restarts: of the job; how often it was requeued.
        task, tasks: number of this task, and how many there are.
        local_task: number of this task among those of its node.
        node, nodes: number of this node, and the names of all.
        tasks_of_nodes: how many tasks each node has.
    """

    job: int
    step: int
    restarts: int
    task: int
    tasks: int
    local_task: int
    node: int
    nodes: tuple[str, ...]
    tasks_of_nodes: tuple[int, ...]

    @property
    def port(self) -> int:
        """Where the step's processes meet: another one for each of the steps at hand."""
        # A job's first steps and those of the next jobs, with which it may share a node, differ.
        return PORTS[(self.job * 47 + self.step) % len(PORTS)]


def find_step(
    environment: Mapping[str, str], expand: Callable[[str], list[str]] | None = None
) -> SlurmStep | None:
    """The step of several tasks that this process belongs to; None where it is no such task.

    Batch scripts and interactive shells have variables about the job, but are no tasks of srun.

    Args:
        environment: such as os.environ.
        expand: as `expand_hosts`, which is the default.
    """
    if not is_in_step(environment):
        return None
    # SLURM_NTASKS may still be the job's in a step with a number of its own.
    tasks_key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if tasks_key not in environment or _number(environment, tasks_key) < 2:
        return None
    tasks = _number(environment, tasks_key)
    nodes = tuple((expand or expand_hosts)(_text(environment, "SLURM_STEP_NODELIST")))
    shares = environment.get("SLURM_STEP_TASKS_PER_NODE") or _text(
        environment, "SLURM_TASKS_PER_NODE"
    )
    found = SlurmStep(
        job=_number(environment, "SLURM_JOB_ID"),
        step=_number(environment, "SLURM_STEP_ID"),
        restarts=_number({"SLURM_RESTART_COUNT": "0", **environment}, "SLURM_RESTART_COUNT"),
        task=_number(environment, "SLURM_PROCID"),
        tasks=tasks,
        local_task=_number(environment, "SLURM_LOCALID"),
        node=_number(environment, "SLURM_NODEID"),
        nodes=nodes,
        tasks_of_nodes=tuple(_shares(shares)),
    )
    _check(found, tasks_key, shares)
    return found


def is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or the shell that it was started in."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP


def expand_hosts(nodelist: str) -> list[str]:
    """Expand a list such as "gpu[01-03,7],login": by scontrol, or where it is absent by us."""
    scontrol = shutil.which("scontrol")
    if scontrol:
        done = subprocess.run(
            [scontrol, "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        # Sites let it print other things, too.
        hosts = [line for line in done.stdout.split("\n") if re.fullmatch(r"[\w.-]+", line)]
        if done.returncode == 0 and hosts:
            return hosts
    return expand_brackets(nodelist)


def expand_brackets(nodelist: str) -> list[str]:
    """`expand_hosts` without Slurm's programs."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        names += _expand(item, nodelist)
    if not names or nodelist.count("[") != nodelist.count("]"):
        raise InputError(
            f"environment: SLURM_STEP_NODELIST is '{nodelist}'; expected a list of hosts such as "
            "node[1-2]."
        )
    return names


def _expand(item: str, nodelist: str) -> list[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit()):
            raise InputError(
                f"environment: '{part}' in SLURM_STEP_NODELIST '{nodelist}' is no range of numbers."
            )
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in _expand(after, nodelist)]


def _shares(text: str) -> list[int]:
    """Tasks of each node, from Slurm's "2(x3),1"."""
    shares: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise InputError(
                f"environment: expected tasks of each node such as 2(x3),1 in "
                f"SLURM_STEP_TASKS_PER_NODE, found '{text}'."
            )
        shares += [int(match[1])] * int(match[2] or 1)
    return shares


def _check(step: SlurmStep, tasks_key: str, shares: str) -> None:
    told = (
        f"{tasks_key} {step.tasks}, tasks of nodes {shares}, nodes {','.join(step.nodes)}, "
        f"SLURM_PROCID {step.task}, SLURM_NODEID {step.node}, SLURM_LOCALID {step.local_task}"
    )
    fits = (
        sum(step.tasks_of_nodes) == step.tasks
        and len(step.tasks_of_nodes) == len(step.nodes)
        and step.task < step.tasks
        and step.node < len(step.nodes)
        and step.local_task < step.tasks_of_nodes[step.node]
    )
    if not fits:
        raise InputError(
            f"environment: Slurm's variables contradict each other: {told}. Were some of them set "
            "by hand, or exported into another job?"
        )


def _text(environment: Mapping[str, str], key: str) -> str:
    if not environment.get(key):
        raise InputError(
            f"environment: this is a task of a Slurm step (SLURM_STEP_ID "
            f"{environment['SLURM_STEP_ID']}), but {key} is not set. Was the environment cleared "
            "under srun?"
        )
    return environment[key]


def _number(environment: Mapping[str, str], key: str) -> int:
    value = _text(environment, key)
    if not value.isdigit():
        raise InputError(f"environment: expected a number in {key}, found '{value}'.")
    return int(value)
