"""Runs the stages, a process each: progress on the terminal, everything in a log, done once.

A stage that has ended well leaves a marker with the fingerprint of its command and configs; the
next call skips it. One that was stopped goes on with the tool's --resume, or writes its files anew.
"""

import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import atomic_path
from virtex_d2.runtime.setup import TRACES
from virtex_d2.runtime.shell import shell
from virtex_d2.runtime.slurm_step import find_step

from .progress import Progress, clock
from .stage import Stage, argv, grouped

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LOG_TAIL = 25  # lines shown of a failed stage
_MAKING = 1.0  # seconds in which another process has surely written its record

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class StageFailedError(Exception):
    """A stage's process ended badly; the message has the end of its log, and where that is."""


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(root: Path, processes: int = 1) -> dict[str, str]:
    """The environment of stages of which so many run at once: this one, and threads.

    Each gets its share of the cores, unless OMP_NUM_THREADS says something else. Threads that wait
    sleep: on a busy machine, spinning ones keep a core from those they wait for.
    """
    share = max(1, cores() // processes)
    threads = {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "PASSIVE"}
    env = {**threads, **os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    return env


def claim_output(output: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Make `output` the folder of this piece of work, or make sure that it is already.

    Args:
        output: the folder.
        kind: what it is, for people and for the name of its record: "demo".
        settings: what may not change between two calls.

    Raises:
        InputError: it holds something else, or the same with other settings; or this process is
            one of several that srun or torchrun has started, which would all do the same work.
    """
    _refuse_several(kind, os.environ)
    record = output / f"{kind}.json"
    _await_record(record)
    if record.is_file():
        found = _read_json(record)
        if found != settings:
            raise InputError(
                f"{output}: holds a {kind} with other settings ({_shown(found)}; now "
                f"{_shown(settings)}). Choose another --output, or remove the folder."
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: holds something that no {kind} has left there. Choose another --output, or "
            "remove it."
        )
    _write_json(record, settings)


def _refuse_several(kind: str, environ: Mapping[str, str]) -> None:
    step = find_step(environ)
    count, starter = (step.tasks, "srun") if step else (environ.get("WORLD_SIZE", "1"), "torchrun")
    if step or ("RANK" in environ and count != "1"):
        raise InputError(
            f"{starter} has started this {count} times, and each would do the whole {kind}: it is "
            "to be started once, and starts the processes of its runs itself. With Slurm: srun "
            "--nodes=1 --ntasks=1, or tools/launch_slurm.py."
        )


def _await_record(record: Path) -> None:
    """Jobs of an array that start together: where one is just making the folder, wait for it."""
    deadline = time.monotonic() + _MAKING
    while not record.is_file() and record.parent.is_dir() and any(record.parent.iterdir()):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    output: Path,
    slots: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every stage that is not complete; neighbours of one group at the same time.

    Args:
        stages: in order; what one needs comes before it.
        root, output: the project's folder, and that of markers and logs.
        slots: environment variables of each place in which a stage can run, such as its GPU: no
            more stages than that run at once. None: as many as a group has.

    Returns:
        Each stage's marker by its name: "command", "seconds" (over all its runs), "threads".

    Raises:
        InputError: a stage's folder was written by another command or with another config.
        StageFailedError: a stage failed; the later ones were not started.
    """
    markers = {stage.name: checked_marker(stage, root, output) for stage in stages}
    numbers = {stage.name: number for number, stage in enumerate(stages, start=1)}
    for group in grouped(stages):
        places = slots or [{}] * len(group)
        runs = [
            _Run(stage, markers[stage.name], root, output, min(len(places), len(group)))
            for stage in group
            if not markers[stage.name].get("complete")
        ]
        kept = [stage for stage in group if markers[stage.name].get("complete")]
        for stage in kept:
            print(_title(stage, numbers, len(stages)), flush=True)
            print(f"  done before, in {clock(markers[stage.name]['seconds'])}: kept", flush=True)
        if runs:
            titles = {run.stage.name: _title(run.stage, numbers, len(stages)) for run in runs}
            _run_together(runs, places, titles)
    return markers


def _title(stage: Stage, numbers: Mapping[str, int], count: int) -> str:
    return f"\n[{numbers[stage.name]}/{count}] {stage.title}"


def elapsed(stages: Iterable[Stage], markers: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of all stages; of those that ran at the same time the longest counts."""
    return sum(max(markers[stage.name]["seconds"] for stage in group) for group in grouped(stages))


def checked_marker(stage: Stage, root: Path, output: Path) -> dict[str, Any]:
    """What an earlier run of the stage has recorded; empty where there was none.

    Raises:
        InputError: it was another command, or had other configs or files.
    """
    path = _marker_path(stage, output)
    if not path.is_file():
        return {}
    marker = _read_json(path)
    if marker.get("fingerprint") != stage.fingerprint(root):
        folder = root / stage.folder
        trained = any((folder / name).exists() for name in TRACES)
        if not marker.get("complete") and stage.again == "--resume" and not trained:
            # It has left nothing to go on from: after a mistake in the command it begins anew.
            return {}
        raise InputError(
            f"{output}: its stage {stage.name} was made by another command, config or input file "
            f"than now ({path}). Choose another --output, or remove the folder."
        )
    return marker


class _Run:
    """A stage's process, its log and its marker, which is kept up to date.

    Args:
        stage: what to run.
        marker: of an earlier run that was stopped, or empty; changed in place.
        root, output: the project's folder, and that of markers and logs.
        processes: how many share the machine.
    """

    def __init__(self, stage: Stage, marker: dict, root: Path, output: Path, processes: int):
        self.stage = stage
        self.log = output / "logs" / f"{stage.name}.log"
        self._marker, self._path = marker, _marker_path(stage, output)
        self._mode = "a" if marker else "w"
        self._root, self._environment = root, environment(root, processes)
        self._command = argv(stage, root, again=bool(marker))
        self._seconds_before = marker.get("seconds", 0.0)
        marker.update(
            fingerprint=stage.fingerprint(root),
            command=shell(argv(stage, root)),
            seconds=self._seconds_before,
            threads=self._environment["OMP_NUM_THREADS"],
            complete=False,
        )

    def start(self, tell: Callable[[str | None], None], slot: Mapping[str, str]) -> None:
        """Start the process; `tell` gets each line of its output, and None at its end."""
        print(f"  {shell(self._command)}", flush=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _write_json(self._path, self._marker)
        self._file = open(self.log, self._mode, encoding="utf-8")  # noqa: SIM115  closed in `end`
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            cwd=self._root,
            env={**self._environment, **slot},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        threading.Thread(target=self._read, args=(tell,), daemon=True).start()

    def _read(self, tell: Callable[[str | None], None]) -> None:
        for line in self._process.stdout:
            line = _ANSI.sub("", line)
            self._file.write(line)
            self._file.flush()
            tell(line)
        tell(None)

    @property
    def seconds(self) -> float:
        """Over all runs of the stage."""
        return self._marker["seconds"]

    def end(self, stop: bool = False) -> int:
        """Wait for the process's end, or bring it about, and record it; returns its exit code."""
        if stop:
            self._process.terminate()  # an interrupt from the terminal has reached it as well
        code = self._process.wait()
        self._file.close()
        self._marker["complete"] = code == 0 and not stop
        self._marker["seconds"] = self._seconds_before + time.monotonic() - self._start
        _write_json(self._path, self._marker)
        return code


def _end_with_parent() -> None:
    """A run whose parent is killed would go on unseen, beside the one that is started next.

    In the child: Linux is to send it SIGTERM when the thread that started it is gone.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _run_together(
    runs: Sequence[_Run], slots: Sequence[Mapping[str, str]], titles: Mapping[str, str]
) -> None:
    """Run processes, as many at the same time as there are slots.

    Where one fails, those that run come to their end, and no other begins.
    """
    news: queue.SimpleQueue[tuple[_Run, str | None]] = queue.SimpleQueue()
    progress = Progress({run.stage.label: run.stage.iterations for run in runs})
    waiting, free = list(runs), list(slots)
    running: dict[str, tuple[_Run, Mapping[str, str]]] = {}
    codes: dict[str, int] = {}
    try:
        while running or (waiting and not any(codes.values())):
            while waiting and free and not any(codes.values()):
                run, slot = waiting.pop(0), free.pop(0)
                print(titles[run.stage.name], flush=True)
                run.start(lambda line, run=run: news.put((run, line)), slot)
                running[run.stage.name] = run, slot
                progress.begin(run.stage.label)
            try:
                run, line = news.get(timeout=1.0)
            except queue.Empty:
                progress.show()
                continue
            if line is None:
                _, slot = running.pop(run.stage.name)
                free.append(slot)
                codes[run.stage.name] = run.end()
                progress.end(run.stage.label)
                if codes[run.stage.name] == 0:
                    print(f"  finished in {clock(run.seconds)}; log: {run.log}", flush=True)
            else:
                progress.update(line.strip(), run.stage.label)
    finally:
        progress.close()
        for run, _ in running.values():
            run.end(stop=True)
    failures = [
        _failure(run.stage, codes[run.stage.name], run.log)
        for run in runs
        if codes.get(run.stage.name)
    ]
    if failures:
        raise StageFailedError("\n".join(failures))


def _failure(stage: Stage, code: int, log: Path) -> str:
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return "\n".join(
        [
            f"the stage {stage.name} {how}. The end of its log:",
            *(f"  | {line}" for line in tail),
            f"The whole log: {log}. There is no report. The same command goes on from here.",
        ]
    )


def _marker_path(stage: Stage, output: Path) -> Path:
    return output / "stages" / f"{stage.name}.json"


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove the folder.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
