"""The text of a job's sbatch script: what Slurm is asked for, the run, and what becomes of it."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.cli import expanded, quote, quote_unread
from virtex_d2.engine.errors import InputError
from virtex_d2.slurm.command import ARRAY, Command, check_command, processes_per_node
from virtex_d2.slurm.options import JobOptions

SCRIPT_SAYS = "== ["  # begins the script's own lines in the log
_STARTS_LINE = re.compile(r"--\w|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*$")


@dataclass(frozen=True)
class Job:
    """One sbatch script."""

    options: JobOptions  # what it asks for
    command: Command  # what it runs
    folder: Path  # for the script, its logs and its records; absolute
    cwd: Path  # where the command is run; absolute
    root: Path  # the project's folder, from which its packages are imported

    def __post_init__(self) -> None:
        check_command(self.command, self.options, self.cwd)
        if unquotable := [p for p in (self.folder, self.cwd) if set(str(p)) & set('"\\\n')]:
            raise InputError(f"{str(unquotable[0])!r}: Slurm cannot take such a folder's name.")

    @property
    def name(self) -> str:
        return self.options.name or self.command.name

    @property
    def log(self) -> str:
        """The log's file name; of an array, with %a for the number."""
        return "log_%a.txt" if self.options.array else "log.txt"

    def text(self) -> str:
        """The script."""
        parts = (self._directives(), self._records(), self._environment(), self._run())
        return "\n".join(line for part in parts for line in part) + "\n"

    def _directives(self) -> list[str]:
        o = self.options
        tasks, cpus = self._tasks
        folder = str(self.folder).replace("%", "%%")  # which begins a pattern there
        asked = {
            "job-name": self.name,
            "nodes": o.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": o.gpus_per_node if o.num_gpus else "",
            "cpus-per-task": cpus or "",
            "mem": o.memory,
            "time": o.time,
            "partition": o.partition,
            "account": o.account,
            "qos": o.qos,
            "constraint": o.constraint,
            "array": o.array,
            "dependency": o.dependency,
            "chdir": self.cwd,
            "output": f"{folder}/{self.log}",
            "open-mode": "append",
            "signal": f"B:USR1@{o.stop_before}",
        }
        return [
            "#!/bin/bash",
            "# Written by tools/launch_slurm.py. `sbatch` of this file submits the job again.",
            *(f"#SBATCH --{key}={_quoted(str(v))}" for key, v in asked.items() if v != ""),
            "#SBATCH --requeue",
            "#SBATCH --kill-on-invalid-dep=yes",
            *(f"#SBATCH {_dashed(expanded(line, '--sbatch'))}" for line in o.sbatch),
        ]

    def _records(self) -> list[str]:
        folder = f"folder={quote(str(self.folder))}"
        return ["", "set -euo pipefail", folder, *_PROLOGUE.splitlines()]

    def _environment(self) -> list[str]:
        o = self.options
        lines: list[str] = []
        for name in o.modules:
            pattern = rf":{re.escape(name)}([:/]|$)"
            # Its exit code is to be believed where it is 0: an alias loads what has another name.
            lines.append(
                " || ".join(_unless_done(f"module load {quote(name)}", _LOADED.format(pattern)))
            )
        if o.conda:
            env = quote_unread(o.conda)
            lines.append('eval "$(conda shell.bash hook)"')
            active = _IN_CONDA.format(quote(f"/{os.path.basename(o.conda)}"), env)
            lines += _unless_done(f"conda activate {env}", active)
        if o.venv:
            env = quote_unread(o.venv)
            lines += _unless_done(f"source {env}/bin/activate", _IN_VENV.format(env))
        if o.setup:
            lines += ["trap at_line ERR", *o.setup, "trap - ERR"]
        if lines:  # in others' scripts commands fail in passing, and read what is not set
            lines = ["set +euo pipefail", *lines, "set -euo pipefail"]
        return [
            "",
            "# ---- environment",
            "# what the submitting shell has of another run: srun says who is who in this one",
            "unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE \\",
            "    GROUP_WORLD_SIZE ROLE_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT \\",
            '    "${!TORCHELASTIC_@}"',
            *lines,
            'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # loader workers share the cores',
            'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" PYTHONUNBUFFERED=1',
            f'export PYTHONPATH={quote(str(self.root))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            *(f"export {name}={quote_unread(value)}" for name, value in o.env.items()),
            "trap - EXIT",
        ]

    def _run(self) -> list[str]:
        o = self.options
        srun = ["--export=ALL", "--kill-on-bad-exit=1", *(_dashed(text) for text in o.srun)]
        if o.cpus_per_task:  # since 22.05 srun does not take it over from sbatch
            srun.append(f"--cpus-per-task={self._tasks[1]}")
        return [
            "",
            "# ---- run",
            *(_RENDEZVOUS.splitlines() if self._by_torchrun else []),
            *_array_of("srun", ["srun", *map(quote_unread, srun)]),
            *_array_of("command", self._words()),
            f"max_stuck={o.max_stuck}",
            *_EPILOGUE.splitlines(),
        ]

    def _words(self) -> list[str]:
        """The command, quoted for the shell."""
        o, command, arguments = self.options, self.command, self.command.arguments
        words = [quote_unread(word) for word in shlex.split(o.container)]
        if command.is_python:
            activated = o.conda or o.venv or o.container
            default = "python" if activated else sys.executable
            words.append(quote_unread(command.python or o.python or default))
            words += map(quote, command.python_options)
            if self._by_torchrun:
                words += ["-m", "torch.distributed.run", "--max-restarts=0"]
                words += [f"--nnodes={o.nodes}", f"--nproc-per-node={self._processes}"]
                words += ["--rdzv-backend=c10d", '--rdzv-endpoint="$rendezvous"']
            if command.resumes and not {"--resume", "--eval-only"} & set(arguments):
                arguments = ("--resume", *arguments)
        read = quote_unread if command.unread else quote
        return words + [_word(word, read) for word in (command.program, *arguments)]

    @property
    def _processes(self) -> int:
        """Of a node."""
        return processes_per_node(self.command, self.options)

    @property
    def _by_torchrun(self) -> bool:
        return self.options.launcher == "torchrun" and not self.command.runs_once

    @property
    def _tasks(self) -> tuple[int, int]:
        """Slurm's tasks of a node, and the processors of each."""
        o = self.options
        if self._by_torchrun:
            return 1, o.cpus_per_task * self._processes
        return self._processes, o.cpus_per_task


# Tests of whether modules and environments are there.
_LOADED = '[[ ":${{LOADEDMODULES:-}}" =~ {} ]]'
_IN_CONDA = '[[ "${{CONDA_PREFIX:-}}" == *{} || "${{CONDA_DEFAULT_ENV:-}}" == {} ]]'
_IN_VENV = '[[ "${{VIRTUAL_ENV:-}}" -ef {0} || "${{CONDA_PREFIX:-}}" -ef {0} ]]'

_RENDEZVOUS = """\
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -xE "[[:alnum:]_.-]+")
rendezvous="${hosts[0]}:$((10000 + SLURM_JOB_ID % 20000))"  # jobs that share a node differ"""

_PROLOGUE = r"""
# ---- records
number="${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}$number"
export VIRTEX_REQUEUE_MARKER="$folder/unfinished$number.json"  # of a run that has to go on
stops="$folder/stops$number.txt"  # the iterations at which it stopped, a line each
mkdir -p "$folder"
rm -f "$VIRTEX_REQUEUE_MARKER"
[[ "${SLURM_RESTART_COUNT:-0}" != 0 ]] || rm -f "$stops"

say() {  # a full disk must not end the script
    local line
    printf -v line '[%(%F %T)T] job %s: %s' -1 "$job" "$*"
    echo "== $line" || true
    echo "$line" >> "$folder/history$number.txt" || true
}

# ---- signals
# Slurm's warning (USR1: time limit, preemption) and its TERM come to this shell. TERM would make
# srun kill the run, so that both are passed on as USR1: save a checkpoint, and stop. Builtins only:
# a command in a trap confuses the `wait` that it interrupts.
run="" asked="" interrupted=""
ask_to_stop() {
    interrupted=1
    [[ -n "$asked" ]] || say "Slurm sent $1: asking the run to save a checkpoint and stop"
    asked=1
    [[ -z "$run" ]] || kill -USR1 "$run" 2> /dev/null || true
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM
at=""
at_line() {  # of this script's own lines, what has failed; in a script that one sources it may
    local status=$?
    ((${#BASH_SOURCE[@]} > 2)) || { at="line ${BASH_LINENO[0]}: $BASH_COMMAND" && exit "$status"; }
}
unless_done() {  # exit code and text of a line, and a test of whether it has done its work
    eval "$3" || { at="$2" && exit $(($1 ? $1 : 1)); }
    (($1 == 0)) || say "exit code $1 of $2, which has done its work: going on"
}
trap 'say "failed with exit code $? before the run: ${at:-$BASH_COMMAND}"' EXIT"""

_EPILOGUE = r"""
say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, until $(squeue -h -j "$job" -o %e)"
echo "command: ${command[*]@Q}"
echo "started by: ${srun[*]@Q} ($SLURM_NTASKS tasks on $SLURM_NNODES nodes, in $PWD)"
env | grep -E '^(CUDA|GLOO|NCCL|OMP|PYTHON|TORCH|VIRTEX)[A-Z0-9_]*=' | sort || true

# Processes ignore both signals until they know what to do with them: one that comes while Python
# still starts would kill the run. It is repeated for those.
(
    trap '' USR1
    exec "${srun[@]}" bash -c 'trap "" USR1 TERM; exec "$@"' run "${command[@]}"
) &
run=$!
repeat=""
while :; do
    if [[ -n "$asked" && -z "$repeat" ]]; then
        while sleep 2 && kill -USR1 "$run" 2> /dev/null; do :; done &
        repeat=$!
    fi
    interrupted=""
    wait "$run" && status=0 || status=$?
    [[ -n "$interrupted" ]] || break
done
[[ -z "$repeat" ]] || kill "$repeat" 2> /dev/null || true
trap '' USR1 TERM

# ---- what becomes of the job
if [[ ! -f "$VIRTEX_REQUEUE_MARKER" ]]; then
    [[ "$status" != 0 ]] && say "failed with exit code $status" || say "finished"
    exit "$status"
fi
persist() {  # the controller may be busy
    for pause in 1 4 10; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}
iteration=$(sed -nE 's/.*"iteration": *([0-9]+).*/\1/p' "$VIRTEX_REQUEUE_MARKER" | head -n 1)
leave() {
    say "unfinished at iteration $iteration, not requeued: $1"
    exit 75
}
if grep -q '"requeue": false' "$VIRTEX_REQUEUE_MARKER"; then
    leave "the file STOP asked for it; submit the script again to go on"
fi
details=$(persist scontrol -o show job "$job") || leave "scontrol does not show the job"
field() { sed -nE "s/.* $1=([^ ]*).*/\1/p" <<< "$details"; }
# A cancelled job would be requeued, too. Of those that Slurm is ending already, only what was
# preempted since it started or is out of time goes on.
state=$(field JobState) preempted=$(field PreemptTime)
if [[ "$state" != RUNNING && "$(field Reason)" != TimeLimit ]] &&
    [[ "$preempted" == None || "$preempted" < "$(field StartTime)" ]]; then
    leave "Slurm ends the job ($state)"
fi
stuck=0
touch "$stops"
while read -r earlier; do
    ((earlier < iteration)) && stuck=0 || stuck=$((stuck + 1))
done < "$stops"
((stuck < max_stuck)) || leave "no progress in $stuck restarts"
echo "$iteration" >> "$stops"
persist scontrol requeue "$job" || leave "Slurm refuses it; submit the script again"
say "unfinished at iteration $iteration: requeued"
"""


def _unless_done(line: str, test: str) -> list[str]:
    """A line that runs others' scripts, whose exit code says less than what they have done."""
    return [line, f"unless_done $? {quote(line)} {quote(test)}"]


def _word(text: str, read: Callable[[str], str]) -> str:
    """A word of the command for the shell: all is quoted but the number of an array's job."""
    parts = [read(part) if part else "" for part in text.split(ARRAY)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(parts) or "''"


def _array_of(name: str, words: Sequence[str]) -> list[str]:
    """A bash array: a flag or a config key begins a line, so that its value stands beside it."""
    lines: list[str] = []
    for word in words:
        if lines and not _STARTS_LINE.match(word):
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return [f"{name}=(", *lines, ")"]


def _quoted(value: str) -> str:
    return f'"{value}"' if set(value) - set(_PLAIN) else value


_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%[]*&|?"


def _dashed(option: str) -> str:
    return option if option.startswith("-") else f"--{option}"
