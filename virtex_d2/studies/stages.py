"""Stages: the commands of a longer piece of work, each a process, done once and continued.

A stage that has ended well leaves a marker with the fingerprint of its command, configs and inputs;
the next call skips it. One that was stopped goes on with the tool's --resume, or writes its files
anew. Two processes never run the same stage at the same time: each is locked while it runs.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtex_d2.engine.cli import shell
from virtex_d2.engine.config import read_config
from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.files import read_json, sha256, write_json
from virtex_d2.engine.identity import texts
from virtex_d2.engine.lock import RunLock
from virtex_d2.engine.parent import end_with_parent
from virtex_d2.engine.run import TRACES
from virtex_d2.engine.topology import tasks_of_step

MARKERS = "stages"  # their folder, in that of the whole
_TAIL = 25  # log lines shown of a failed stage
_NAMED = 10  # differences that a message names
_MAKING = 1.0  # seconds in which another process has surely written its record
_PERIOD, _TERMINAL_PERIOD = 10.0, 0.5  # seconds between lines of progress
_WIDTH = 100  # characters of such a line
_POLL = 0.05  # seconds
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LOG_PREFIX = re.compile(r"^\[[\d/]+ [\d:]+ [\w.]+\]:? +")  # "[11/21 05:50:53 pretrain.trainer]: "


class StageFailedError(Exception):
    """A stage's process ended badly; the message has the end of its log, and where that is.

    Attributes:
        code: exit code for the tool: 2 where the stages refused what they were given, so that the
            same command would fail again; else 1.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def exit_on_stop() -> Iterator[None]:
    """End a tool that runs stages with a message instead of a traceback.

    Raises:
        SystemExit: a stage failed, with its exit code; or Ctrl-C was pressed, with 130.
    """
    try:
        yield
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str  # a file name for its marker and log, e.g. "seed1-pretrain"
    title: str  # one line for people
    command: tuple[str, ...]  # arguments after the interpreter, relative to the project's root
    folder: str  # what it writes into, relative to the root or absolute
    configs: tuple[str, ...] = ()  # config files that it reads, relative to the root
    needs: tuple["Stage", ...] = field(default=(), repr=False)  # the stages whose output it reads
    # files of others that it reads, such as weights: another content is another stage
    files: tuple[str, ...] = ()
    # the flag with which the tool goes on from, or replaces, what a stopped run has left
    again: str = "--resume"
    label: str = ""  # a word for the progress line
    group: str = ""  # neighbours of the same group run at the same time; "" for a stage on its own

    def argv(self, root: Path, again: bool = False) -> list[str]:
        """Give what to execute in the project's root, the interpreter first."""
        relative = os.path.relpath(sys.executable, root)  # .venv/bin/python, as people type it
        python = sys.executable if relative.startswith("..") else relative
        script, *arguments = self.command
        return [python, script, *([self.again] if again else []), *arguments]

    def made_of(self, root: Path) -> dict[str, Any]:
        """Give what `fingerprint` is of, so that what has changed can be named.

        Returns:
            "command", words; by name "configs", {key: text} each; "files", their SHA-256; "needs",
            fingerprints.
        """
        return {
            "command": list(self.command),
            "configs": {config: texts(read_config(root / config)) for config in self.configs},
            "files": {file: _content_hash(root / file) for file in self.files},
            "needs": {stage.name: stage.fingerprint(root) for stage in self.needs},
        }

    def fingerprint(self, root: Path) -> str:
        """Hash the command, its config files (with those they include), and its inputs."""
        parts = [json.dumps(self.command)]
        parts += [json.dumps(read_config(root / path), sort_keys=True) for path in self.configs]
        parts += [_content_hash(root / file) for file in self.files]
        parts += [stage.fingerprint(root) for stage in self.needs]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _content_hash(path: Path) -> str:
    try:
        status = path.stat()
        return _hash_of_version(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot read this file: {error.strerror}.") from error


@functools.lru_cache(maxsize=1024)
def _hash_of_version(path: Path, modified: int, size: int) -> str:
    """Read a file once for all stages that need it; `modified` and `size` are the cache's key."""
    return sha256(path)


def claim_output(output: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Make `output` the folder of this piece of work, or make sure that it is already.

    Args:
        kind: what it is, for people and for the name of its record: "demo".
        settings: what may not change between two calls.
    """
    _refuse_several(kind, os.environ)
    record = output / f"{kind}.json"
    deadline = time.monotonic() + _MAKING
    # Jobs of an array start together: one of them may just be making the folder.
    while not record.is_file() and _holds_something(output) and time.monotonic() < deadline:
        time.sleep(0.05)
    if record.is_file():
        found = read_json(record)
        if found != settings:
            before, now = (
                ", ".join(f"{name} {value}" for name, value in each.items())
                for each in (found, settings)
            )
            raise InputError(
                f"{output}: holds a {kind} with other settings ({before}; now {now}). Choose "
                "another --output, or remove the folder."
            )
    elif _holds_something(output):
        raise InputError(
            f"{output}: holds something that no {kind} has left there. Choose another --output, or "
            "remove it."
        )
    else:
        write_json(record, settings)


def _holds_something(output: Path) -> bool:
    return output.exists() and (not output.is_dir() or any(output.iterdir()))


def _refuse_several(kind: str, environ: Mapping[str, str]) -> None:
    tasks = tasks_of_step(environ)
    count, starter = (tasks, "srun") if tasks > 1 else (environ.get("WORLD_SIZE", "1"), "torchrun")
    if tasks > 1 or ("RANK" in environ and count != "1"):
        raise InputError(
            f"{starter} has started this {count} times, and each would do the whole {kind}: it is "
            "to be started once, and starts the processes of its runs itself. With Slurm: srun "
            "--nodes=1 --ntasks=1, or tools/launch_slurm.py."
        )


def checked_marker(stage: Stage, root: Path, output: Path) -> dict[str, Any]:
    """Read what an earlier run of the stage has recorded; empty where there was none."""
    path = _marker(stage, output)
    if not path.is_file():
        return {}
    marker = read_json(path)
    if marker.get("fingerprint") == stage.fingerprint(root):
        return marker
    trained = any((root / stage.folder / name).exists() for name in TRACES)
    if not marker.get("complete") and stage.again == "--resume" and not trained:
        return {}  # nothing to go on from: after a mistake in the command it begins anew
    told = list(_differences(stage, root, marker)) or [
        f"the content of one of {', '.join([*stage.configs, *stage.files])}, or the command's order"
    ]
    if len(told) > _NAMED:
        told[_NAMED:] = [f"and {len(told) - _NAMED} more"]
    raise InputError(
        f"{output}: its stage {stage.name} was made by another command, config or input file than "
        f"now ({path}):\n  " + "\n  ".join(told) + "\nGive all of it as it was before, or choose "
        "another --output."
    )


def _marker(stage: Stage, output: Path) -> Path:
    return output / MARKERS / f"{stage.name}.json"


def _differences(stage: Stage, root: Path, marker: Mapping[str, Any]) -> Iterator[str]:
    """Name what is not as it was: a line for each option, config key or file."""
    now = stage.made_of(root)
    # Markers of older versions have the command alone, as text with the interpreter.
    before = marker.get("made_of") or {"command": shlex.split(marker.get("command", ""))[1:]}
    compared = [("", *(_options(each["command"]) for each in (before, now)))]
    for part, word in (("configs", "config file"), ("files", "file"), ("needs", "stage")):
        for name in before.get(part, {}).keys() & now[part].keys():
            old, new = before[part][name], now[part][name]
            if isinstance(old, dict):
                compared.append((f"{word} {name}: ", old, new))
            elif old != new:
                yield f"{word} {name}: its content has changed"
    for place, old, new in compared:
        for key in dict.fromkeys([*old, *new]):
            was, is_now = (each.get(key, "not given") for each in (old, new))
            if was != is_now:
                yield f"{place}{key}: {was or repr(was)} before, now {is_now or repr(is_now)}"


def _options(command: list[str]) -> dict[str, str]:
    """Take a command's KEY VALUE and --flag VALUE pairs; the last of a key counts."""
    return dict(zip(command[1::2], command[2::2]))


def clock(seconds: float) -> str:
    """75.4 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(root: Path, processes: int = 1) -> dict[str, str]:
    """Give this process's environment to stages of which so many run at once, with threads.

    Each gets its share of the cores, unless OMP_NUM_THREADS says something else. Threads that wait
    sleep: on a busy machine, spinning ones keep a core from those they wait for.
    """
    share = max(1, cores() // processes)
    threads = {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "PASSIVE"}
    env = {**threads, **os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    return env


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    output: Path,
    slots: Sequence[Mapping[str, str]] | None = None,
    alone: bool = True,
) -> dict[str, dict[str, Any]]:
    """Run every stage that is not complete; neighbours of one group at the same time.

    Args:
        stages: in order; what one needs comes before it.
        root, output: the project's folder, and that of markers and logs.
        slots: environment variables of each place in which a stage can run, such as its GPU: no
            more stages than that run at once. None: as many as a group has.
        alone: whether `output` is this call's as long as it lasts. False: for the tasks of a job
            array, which run other stages of the same folder at the same time.

    Returns:
        Each stage's marker by its name: "command", "seconds" (over all its runs), "threads".

    Raises:
        StageFailedError: a stage failed; the later ones were not started.
    """
    (output / MARKERS).mkdir(parents=True, exist_ok=True)
    lost: list[InputError] = []  # by the threads that keep the locks
    lock = RunLock(output, lost.append, key="--output")
    if alone:
        lock.acquire()
    try:
        markers = {stage.name: checked_marker(stage, root, output) for stage in stages}
        titles = {
            stage.name: f"\n[{number}/{len(stages)}] {stage.title}"
            for number, stage in enumerate(stages, start=1)
        }
        for group in grouped(stages):
            places = slots or [{}] * len(group)
            share = environment(root, min(len(places), len(group)))
            runs = []
            for stage in group:
                marker = markers[stage.name]
                if marker.get("complete"):
                    before = clock(marker["seconds"])
                    print(f"{titles[stage.name]}\n  done before, in {before}: kept", flush=True)
                else:
                    runs.append(_Run(stage, marker, root, output, share, lost))
            _run_together(runs, places, titles, lost)
        return markers
    finally:
        lock.release()


def grouped(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Put neighbours together that have the same group."""
    by_group = itertools.groupby(stages, key=lambda stage: stage.group or stage.name)
    return [list(members) for _, members in by_group]


def elapsed(stages: Iterable[Stage], markers: Mapping[str, Mapping[str, Any]]) -> float:
    """Add up the stages' seconds; of those that ran at the same time the longest counts."""
    return sum(max(markers[stage.name]["seconds"] for stage in group) for group in grouped(stages))


@dataclass
class _Run:
    """A stage's process with its lock, its log, and its marker, which is kept up to date."""

    stage: Stage  # what to run
    marker: dict[str, Any]  # of an earlier run that was stopped, or empty; changed in place
    # root, output: the project's folder, and that of markers and logs
    root: Path
    output: Path
    environment: Mapping[str, str]  # of the process
    lost: list[InputError]  # where to tell that another process has taken the stage over

    def start(self, slot: Mapping[str, str]) -> bool:
        """Start the process; nothing and False where another one has done the stage meanwhile."""
        name = f"{MARKERS}/{self.stage.name}"
        self._lock = RunLock(self.output, self.lost.append, "--output", name)
        self._lock.acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            # Only now is it known that nobody else changes it.
            self.marker.update(checked_marker(self.stage, self.root, self.output))
            if self.marker.get("complete"):
                return False
            again = bool(self.marker)
            command = self.stage.argv(self.root, again)
            print(f"  {shell(command)}", flush=True)
            self._before = self.marker.get("seconds", 0.0)
            self.marker.update(
                fingerprint=self.stage.fingerprint(self.root),
                made_of=self.stage.made_of(self.root),
                command=shell(self.stage.argv(self.root)),
                seconds=self._before,
                threads=self.environment["OMP_NUM_THREADS"],
                complete=False,
            )
            self._record()
            self._started = time.monotonic()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "ab" if again else "wb") as log:
                self._log_begins = log.tell()
                self._process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env={**self.environment, **slot},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=functools.partial(end_with_parent, signal.SIGTERM, os.getpid()),
                )
            undo.pop_all()
        return True

    def end(self, stop: bool = False) -> int:
        """Wait for the process's end, or bring it about, and record it; returns its exit code."""
        if stop:
            self._process.terminate()  # an interrupt from the terminal has reached it as well
        code = self._process.wait()
        self.marker["complete"] = code == 0 and not stop
        self.marker["seconds"] = self._before + time.monotonic() - self._started
        self._record()
        self._lock.release()
        return code

    def _record(self) -> None:
        write_json(_marker(self.stage, self.output), self.marker)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    @property
    def log(self) -> Path:
        """Where what the process writes to its terminal goes."""
        return self.output / "logs" / f"{self.stage.name}.log"

    def last_lines(self, count: int) -> list[str]:
        """Read the end of what this process has written into the log."""
        with open(self.log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begins, size - 1000 * count))
            text = _ANSI.sub("", file.read().decode("utf-8", errors="replace"))
        return text.splitlines()[-count:]

    def failure(self, code: int) -> StageFailedError:
        """Tell how the process ended, with the end of its log."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        refused = code == EXIT_CODE
        then = (
            "It refused what it was given, and would again: mend that first."
            if refused
            else "The same command goes on from here."
        )
        told = [f"the stage {self.stage.name} {how}. The end of its log:"]
        told += [f"  | {line}" for line in self.last_lines(_TAIL)]
        told.append(f"The whole log: {self.log}. There is no report. {then}")
        return StageFailedError("\n".join(told), EXIT_CODE if refused else 1)


def _run_together(
    waiting: list[_Run],
    slots: Sequence[Mapping[str, str]],
    titles: Mapping[str, str],
    lost: list[InputError],
) -> None:
    """Run processes, as many at the same time as there are slots.

    Where one fails, those that run come to their end, and no other begins.
    """
    count, free = len(waiting), list(slots)
    running: list[tuple[_Run, Mapping[str, str]]] = []
    failures: list[StageFailedError] = []
    progress = _Progress()
    try:
        while running or (waiting and not failures):
            if lost:
                raise lost[0]
            while waiting and free and not failures:
                run = waiting.pop(0)
                print(titles[run.stage.name], flush=True)
                try:
                    if run.start(free[0]):
                        running.append((run, free.pop(0)))
                    else:
                        print("  done by another process meanwhile: kept", flush=True)
                except InputError as error:
                    failures.append(StageFailedError(str(error), EXIT_CODE))
            time.sleep(_POLL)
            for run, slot in [each for each in running if each[0].ended]:
                progress.clear()
                running.remove((run, slot))
                free.append(slot)
                if code := run.end():
                    failures.append(run.failure(code))
                else:
                    seconds = clock(run.marker["seconds"])
                    print(f"  finished in {seconds}; log: {run.log}", flush=True)
            done = f"{count - len(waiting) - len(running)} of {count} done" if count > 1 else ""
            progress.show([run for run, _ in running], done)
    finally:
        progress.clear()
        for run, _ in running:
            run.end(stop=True)
    if failures:
        codes = {failure.code for failure in failures}
        raise StageFailedError("\n".join(map(str, failures)), codes.pop() if len(codes) == 1 else 1)


class _Progress:
    """The running processes' last log lines: redrawn on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._in_place = sys.stdout.isatty()
        self._period = _TERMINAL_PERIOD if self._in_place else _PERIOD
        self._start = self._shown = time.monotonic()

    def show(self, runs: Sequence[_Run], done: str) -> None:
        """Write, where the last time is long enough ago."""
        now = time.monotonic()
        if not runs or now - self._shown < self._period:
            return
        self._shown = now
        begin = " · ".join(filter(None, [f"  {clock(now - self._start)}", done]))
        width = (_WIDTH - len(begin)) // len(runs) - 3
        lines = [
            f"{run.stage.label}: {_LOG_PREFIX.sub('', next(iter(run.last_lines(1)), 'running'))}"
            for run in runs
        ]
        text = " · ".join([begin, *(line.removeprefix(": ")[:width] for line in lines)])
        print(f"\r\x1b[K{text}" if self._in_place else f"{text}\n", end="", flush=True)

    def clear(self) -> None:
        """Remove the line that is redrawn in place."""
        if self._in_place:
            print("\r\x1b[K", end="", flush=True)
