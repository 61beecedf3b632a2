"""What became of submitted jobs, by scontrol and the jobs' own records; and their logs, live."""

import functools
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virtex_d2.slurm.script import SCRIPT_SAYS
from virtex_d2.slurm.submit import SlurmError, Submitted, slurm

ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "FORGOTTEN"),
}
_FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")
_NO_SUCH_JOB = "Invalid job id"
_print = functools.partial(print, flush=True)
_LOOK, _ASK = 1.0, 5.0  # seconds between looks at the logs, and between questions to Slurm
_TAIL = 20  # lines of a log that is there already


@dataclass(frozen=True)
class State:
    """One job, or one of an array's."""

    job_id: str  # e.g. "12", "12_3", or "12_4-17" of an array's pending ones
    number: str = ""  # "3" of "12_3", "" where the job is no array's
    name: str = "FORGOTTEN"  # Slurm's word, e.g. RUNNING; FORGOTTEN where Slurm knows it no more
    reason: str = ""  # why it waits, or ""; of a forgotten job the last word of its own record
    # nodes, time, restarts: where, how long of its limit, how often begun anew
    nodes: str = ""
    time: str = ""
    restarts: str = ""
    exit_code: str = ""  # of an ended job, "" of a live one

    @property
    def ended_well(self) -> bool:
        return self.name == "COMPLETED" or (self.name == "FORGOTTEN" and self.reason == "finished")

    def __str__(self) -> str:
        words = [self.name]
        words += [f"({self.reason})"] if self.reason else []
        words += [f"on {self.nodes}"] if self.nodes else []
        words += [f"restart {self.restarts}"] if self.restarts not in ("", "0") else []
        words += [f"exit code {self.exit_code}"] if self.exit_code else []
        return " ".join(words)


def job_states(job: Submitted) -> list[State]:
    """The states of a job, of an array one for each that has begun and one for the rest.

    Slurm forgets a job some minutes after its end (MinJobAge); then the last line of its own record
    tells.

    Raises:
        SlurmError: the controller does not answer.
    """
    try:
        lines = slurm("scontrol", "-o", "show", "job", job.job_id).splitlines()
    except SlurmError as error:
        if _NO_SUCH_JOB not in str(error):
            raise
        return _remembered(job)
    # Sites let it print other things, too.
    states = [_state(dict(_FIELD.findall(line))) for line in lines if "JobState=" in line]
    if not states:
        raise SlurmError(f"scontrol does not tell the state of job {job.job_id}: {lines}")
    return sorted(states, key=lambda state: _order(state.number))


def _state(fields: dict[str, str]) -> State:
    number, name = fields.get("ArrayTaskId", ""), fields["JobState"]
    job_id = fields["ArrayJobId"] + f"_{number}" if number else fields["JobId"]
    reason = fields.get("Reason", "None")
    return State(
        job_id=job_id,
        number=number if number.isdigit() else "",
        name=name,
        reason="" if reason == "None" else reason,
        nodes=fields.get("NodeList", "").replace("(null)", "") if name != "PENDING" else "",
        time=f"{fields.get('RunTime', '')} of {fields.get('TimeLimit', '')}",
        restarts=fields.get("Restarts", ""),
        exit_code=fields.get("ExitCode", "").partition(":")[0] if name in ENDED else "",
    )


def _remembered(job: Submitted) -> list[State]:
    states = []
    for path in sorted(job.folder.glob("history*.txt"), key=lambda p: _order(p.stem[8:])):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        number = path.stem.partition("_")[2]
        last = lines[-1].partition(": ")[2] if lines else ""
        states.append(State(f"{job.job_id}{number and '_'}{number}", number, reason=last))
    return states or [State(job.job_id)]


def _order(number: str) -> tuple[bool, int]:
    return (not number.isdigit(), int(number) if number.isdigit() else 0)


def status_table(jobs: Iterable[Submitted]) -> str:
    """A line for each job: id, name, state, and the last line of its log.

    Raises:
        SlurmError: the controller does not answer.
    """
    rows = [("job", "name", "state", "time", "last line of the log")]
    for job in jobs:
        for state in job_states(job):
            last = _last_line(job.path(state.number))
            rows.append((state.job_id, job.name, str(state), state.time, last))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[4]]).rstrip()
        for row in rows
    )


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[-100:] for line in reversed(lines) if line.strip()), "")


@dataclass
class _Log:
    """A growing file, of which each line is told once."""

    path: Path
    _place: int | None = field(default=None)

    def new_lines(self) -> list[str]:
        """Whole lines since the last call; of a file that was there before, the last ones."""
        if not self.path.is_file():
            self._place = self._place or 0
            return []
        with open(self.path, "rb") as file:
            file.seek(self._place or 0)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").splitlines()
        if self._place is None:
            lines = lines[-_TAIL:]
        self._place = (self._place or 0) + len(whole)
        return lines


def follow(jobs: Sequence[Submitted]) -> bool:
    """Print the jobs' states when they change, and their logs' new lines, until all have ended.

    A controller that does not answer is asked again; a requeued job is followed through its next
    start.

    Returns:
        Whether all ended well.
    """
    states: dict[str, State] = {}
    logs: dict[str, _Log] = {}
    asked, complaint = -_ASK, ""
    while True:
        if time.monotonic() - asked >= _ASK:
            asked = time.monotonic()
            try:
                current = {s.job_id: (job, s) for job in jobs for s in job_states(job)}
            except SlurmError as error:
                current = {}
                if str(error) != complaint:
                    _print(f"-- Slurm does not answer, asking again: {error}")
                complaint = str(error)
            for job_id, (job, state) in current.items():
                logs.setdefault(job_id, _Log(job.path(state.number)))
                if str(states.get(job_id, "")) != str(state):
                    if states:
                        _print_lines(logs)  # what it said before its state changed
                    _print(f"-- {job.name} {job_id}: {state}")
            if current:
                states = {job_id: state for job_id, (_, state) in current.items()}
        if _print_lines(logs):
            asked = -_ASK  # the script says that something has changed
        if states and all(state.name in ENDED for state in states.values()):
            return all(state.ended_well for state in states.values())
        time.sleep(_LOOK)


def _print_lines(logs: dict[str, _Log]) -> bool:
    """Print the new lines; returns whether one is of the batch script itself."""
    several, of_script = len(logs) > 1, False
    for job_id, log in logs.items():
        for line in log.new_lines():
            of_script |= line.startswith(SCRIPT_SAYS)
            _print(f"{job_id} | {line}" if several else line)
    return of_script
