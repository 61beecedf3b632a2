"""Writes a job's script into a folder of its own, hands it to sbatch, and notes what came of it."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json, write_json, write_text
from virtex_d2.slurm.command import check_configs, read_command
from virtex_d2.slurm.options import Stage
from virtex_d2.slurm.script import Job

SCRIPT, RECORD = "job.sbatch", "job.json"
_PATIENCE = 120  # seconds for an answer of Slurm's controller
# Of an outer job's variables none may reach a new one, and of the user's defaults for sbatch
# (SBATCH_...) none that the script sets, because they would win over it.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
# How Slurm says that it finds no slurm.conf, or nobody at the place that is written there.
_CONFIGURATION = re.compile(
    r"configuration (source|file)|slurm\.conf|[Uu]nable to contact|onnection refused"
)
_NUMBER = re.compile(r"^\s*(\d+)(?:;\S+)?\s*$", re.MULTILINE)  # or NUMBER;CLUSTER
_NO_CLUSTER = (
    "Run this on a machine of a cluster with Slurm, such as a login node, where sinfo answers; "
    "--dry-run prints the script anywhere."
)
_SBATCH_NAMES = {"array": "ARRAY_INX", "mem": "MEM_PER_NODE", "time": "TIMELIMIT"}


class SlurmError(Exception):
    """One of Slurm's commands failed; the message is its own."""


class NoAnswerError(SlurmError):
    """Slurm has not answered: what it was asked for may have happened."""


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has accepted."""

    job_id: str  # Slurm's number of it; of an array, of the whole
    name: str  # the job's name
    folder: Path  # with script, logs and records
    log: str  # the log's file name; of an array, with %a for the number

    def path(self, number: str = "") -> Path:
        """The log; `number` is of an array's job."""
        return self.folder / self.log.replace("%a", number)


def slurm(*command: object, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SlurmError: it failed, or the controller does not answer.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except FileNotFoundError:
        raise InputError(f"{words[0]}: not found. {_NO_CLUSTER}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{words[0]}: no answer from Slurm in {_PATIENCE} seconds") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise (NoAnswerError if "timed out" in said else SlurmError)(said)
    return done.stdout


def new_folder(logs: Path, name: str) -> Path:
    """A folder for a job or pipeline that does not exist yet; it is not made."""
    name = re.sub(r"[^\w.-]", "_", name)
    first = folder = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    count = 1
    while folder.exists():
        count += 1
        folder = first.with_name(f"{first.name}-{count}")
    return folder


def submit(job: Job, after: Sequence[str] = ()) -> Submitted:
    """Write the job's script and give it to sbatch.

    Args:
        job: whose folder does not exist yet.
        after: ids of jobs that must have ended well before it starts.
    """
    script = job.folder / SCRIPT
    new = [folder for folder in (job.folder, *job.folder.parents) if not folder.exists()]
    try:
        job.folder.mkdir(parents=True)
        write_text(script, job.text())
    except OSError as error:
        raise InputError(
            f"--logs {job.folder.parent}: cannot write there: {error.strerror}. Choose another."
        ) from error
    wanted = [job.options.dependency, *([f"afterok:{':'.join(after)}"] if after else [])]
    dependency = [f"--dependency={','.join(filter(None, wanted))}"] if after else []
    try:
        answer = slurm("sbatch", "--parsable", *dependency, script, env=environment(job))
        numbers = _NUMBER.findall(answer)  # sites let it print other things, too
        if not numbers:
            raise NoAnswerError(f"sbatch has answered without a job's number:\n{answer.strip()}")
    except NoAnswerError as error:
        raise InputError(
            f"{error}\nThe job may have been submitted: look at squeue --me before you try again. "
            f"Its script: {script}"
        ) from error
    except (SlurmError, InputError) as error:
        _remove(new)
        if isinstance(error, InputError):
            raise
        hint = f"\n{_NO_CLUSTER}" if _CONFIGURATION.search(str(error)) else ""
        raise InputError(f"sbatch refuses the job {job.name}:\n{error}{hint}") from error
    submitted = Submitted(numbers[-1], job.name, job.folder, job.log)
    record = {"job_id": submitted.job_id, "name": submitted.name, "log": submitted.log}
    write_json(job.folder / RECORD, record)
    return submitted


def _remove(folders: Sequence[Path]) -> None:
    """Those that were made for a job, the innermost first."""
    shutil.rmtree(folders[0], ignore_errors=True)
    with contextlib.suppress(OSError):  # another job is in there
        for folder in folders[1:]:
            folder.rmdir()


def environment(job: Job) -> dict[str, str]:
    """The variables with which sbatch is called."""
    keys = re.findall(r"^#SBATCH --([\w-]+)", job.text(), re.MULTILINE)
    names = {key: _SBATCH_NAMES.get(key, key.upper().replace("-", "_")) for key in keys}
    replaced = {f"SBATCH_{name}" for name in names.values()}
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith("SLURM_") or name in replaced)
    }


def submit_pipeline(jobs: Sequence[tuple[Stage, Job]]) -> list[Submitted]:
    """Submit the stages in order, each dependent on those that it comes after."""
    done: dict[str, Submitted] = {}
    try:
        for stage, job in jobs:
            done[stage.name] = submit(job, [done[name].job_id for name in stage.after])
    except InputError as error:
        if not done:
            raise
        slurm("scancel", *(submitted.job_id for submitted in done.values()))
        raise InputError(f"{error}\nCancelled again: {', '.join(done)}.") from error
    return list(done.values())


def stage_jobs(
    stages: Sequence[Stage], folder: Path, cwd: Path, root: Path
) -> list[tuple[Stage, Job]]:
    """A job for each stage, in a folder of its own below `folder`.

    Args:
        stages: in order. One without a name is a command line, whose words a shell has read.
        folder: of the pipeline; it is not made.
    """
    jobs: list[tuple[Stage, Job]] = []
    for stage in stages:
        try:
            command = read_command(stage.command, cwd, root, unread=bool(stage.name))
            job = Job(stage.options, command, folder / stage.name, cwd, root)
            check_configs(command, stage.options, cwd, [other.command for _, other in jobs])
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}" if stage.name else str(error)) from None
        jobs.append((stage, job))
    return jobs


def find_submitted(logs: Path, wanted: Sequence[str]) -> list[Submitted]:
    """Jobs by their ids or folders, or all of the folder of logs, the newest last."""
    records = sorted([*logs.glob(f"*/{RECORD}"), *logs.glob(f"*/*/{RECORD}")])
    known = [_read(path) for path in records]
    if not wanted:
        if not known:
            raise InputError(
                f"{logs}: no job was submitted from here. --logs names another folder."
            )
        return sorted(known, key=lambda job: int(job.job_id))
    found = []
    for word in wanted:
        below = Path(word).resolve()
        chosen = [j for j in known if j.job_id == word.partition("_")[0]] or [
            _read(path) for path in sorted(below.rglob(RECORD)) if below.is_dir()
        ]
        if not chosen:
            raise InputError(
                f"{word}: neither a folder with a submitted job, nor a job of {logs}. --logs names "
                "another folder."
            )
        found += chosen[-1:] if word.partition("_")[0].isdigit() else chosen
    return found


def _read(path: Path) -> Submitted:
    try:
        record = read_json(path)
        # The folder may have been moved or copied meanwhile.
        return Submitted(str(int(record["job_id"])), record["name"], path.parent, record["log"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no record of a job: {error}. Remove it.") from error
