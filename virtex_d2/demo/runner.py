"""Runs the stages, one process each: progress on the terminal, everything in a log, done once.

A stage that has ended well leaves a marker with the fingerprint of its command and configs; the
next demo skips it. One that was stopped goes on with the tool's --resume, or writes its files anew.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import atomic_path

from .plan import Budget, Plan, Stage, argv, shell

LOG_TAIL = 25  # lines shown of a failed stage
PROGRESS_SECONDS = 10.0  # between progress lines where the output is no terminal

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ITERATION = re.compile(r"\biter: (\d+)")
_ETA = re.compile(r"\beta: ([\w:, ]+?)  ")
_LOSS = re.compile(r"\btotal_loss: ([\d.eE+-]+)")
_LOG_PREFIX = re.compile(r"^\[[\d/]+ [\d:]+ [\w.]+\]:? ")  # "[11/21 05:50:53 pretrain.trainer]: "


class StageFailedError(Exception):
    """A stage's process ended badly; the message has the end of its log, and where that is."""


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(root: Path) -> dict[str, str]:
    """The environment of the stages: this one, with a thread for each core unless it says more.

    Threads that wait sleep: on a busy machine, spinning ones keep a core from those they wait for.
    """
    threads = {"OMP_NUM_THREADS": str(cores()), "OMP_WAIT_POLICY": "PASSIVE"}
    env = {**threads, **os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    return env


def claim_output(output: Path, budget: Budget) -> None:
    """Make `output` this demo's, or make sure that it is already.

    Raises:
        InputError: it holds something else, or a demo of another scale.
    """
    record = output / "demo.json"
    settings = {"scale": budget.scale}
    if record.is_file():
        found = _read_json(record)
        if found != settings:
            raise InputError(
                f"{output}: holds a demo with other settings ({_shown(found)}; now "
                f"{_shown(settings)}). Choose another --output, or remove the folder."
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: holds something that no demo has left there. Choose another --output, or "
            "remove it."
        )
    _write_json(record, settings)


def run_plan(plan: Plan, root: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Run every stage that is not complete.

    Returns:
        Each stage's marker by its name: "command", "seconds" (over all its runs), "threads".

    Raises:
        InputError: a stage's folder was written by another command or with another config.
        StageFailedError: a stage failed; the later ones were not started.
    """
    markers = {stage.name: _checked_marker(stage, root, output) for stage in plan.stages}
    for number, stage in enumerate(plan.stages, start=1):
        print(f"\n[{number}/{len(plan.stages)}] {stage.title}", flush=True)
        marker = markers[stage.name]
        if marker.get("complete"):
            print(f"  done before, in {clock(marker['seconds'])}: kept", flush=True)
            continue
        markers[stage.name] = _run_stage(stage, marker, root, output)
    return markers


def clock(seconds: float) -> str:
    """75.4 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _checked_marker(stage: Stage, root: Path, output: Path) -> dict[str, Any]:
    path = _marker_path(stage, output)
    if not path.is_file():
        return {}
    marker = _read_json(path)
    if marker.get("fingerprint") != stage.fingerprint(root):
        raise InputError(
            f"{output}: its stage {stage.name} was made by another command or config than now "
            f"({path}). Choose another --output, or remove the folder."
        )
    return marker


def _run_stage(stage: Stage, marker: dict, root: Path, output: Path) -> dict[str, Any]:
    started_before = bool(marker)
    command = argv(stage, root, again=started_before)
    log = output / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  {shell(command)}", flush=True)

    marker = {
        "fingerprint": stage.fingerprint(root),
        "command": shell(argv(stage, root)),
        "seconds": marker.get("seconds", 0.0),
        "threads": environment(root)["OMP_NUM_THREADS"],
        "complete": False,
    }
    _write_json(_marker_path(stage, output), marker)
    start = time.monotonic()
    try:
        with open(log, "a" if started_before else "w", encoding="utf-8") as file:
            code = _run_process(command, root, file, Progress(stage.iterations))
        marker["complete"] = code == 0
    finally:
        marker["seconds"] += time.monotonic() - start
        _write_json(_marker_path(stage, output), marker)
    if code:
        raise StageFailedError(_failure(stage, code, log))
    print(f"  finished in {clock(marker['seconds'])}; log: {log}", flush=True)
    return marker


def _run_process(command: list[str], root: Path, log: IO[str], progress: "Progress") -> int:
    """Its exit code; every line of its output goes to the log, the telling ones to `progress`."""
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment(root),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
    try:
        while (line := _next_line(lines)) is not None:
            if line:
                line = _ANSI.sub("", line)
                log.write(line)
                log.flush()
            progress.update(line.strip())
        return process.wait()
    except BaseException:
        process.terminate()  # it has had the interrupt itself where that came from the terminal
        process.wait()
        raise
    finally:
        progress.close()


def _read_lines(stream: IO[str], lines: queue.SimpleQueue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _next_line(lines: queue.SimpleQueue) -> str | None:
    """The next line; "" where none came for a second; None at the end."""
    try:
        return lines.get(timeout=1.0)
    except queue.Empty:
        return ""


class Progress:
    """Shows how far a process is: one line that is redrawn on a terminal, else a line now and then.

    Understands detectron2's log lines ("iter: 120  total_loss: 1.9  eta: 0:03:10"), and shows the
    latest of the others; of a process that does not train, the latest line of any kind.

    Args:
        iterations: the last iteration; 0 where the process does not train.
        stream: where to.
    """

    def __init__(self, iterations: int, stream: IO[str] | None = None):
        self._iterations = iterations
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._period = 0.5 if self._in_place else PROGRESS_SECONDS
        self._start = self._shown_at = time.monotonic()
        self._at = ""
        self._latest = ""

    def update(self, line: str) -> None:
        """Take a line of output, or "" where only time has passed."""
        iteration = _ITERATION.search(line)
        if iteration:
            done = f"iteration {int(iteration[1]) + 1}"
            parts = [f"{done} of {self._iterations}" if self._iterations else done]
            parts += [f"loss {float(found[1]):.3f}" for found in [_LOSS.search(line)] if found]
            parts += [f"{found[1]} to go" for found in [_ETA.search(line)] if found]
            self._at, self._latest = " · ".join(parts), ""
        elif _LOG_PREFIX.match(line) or (line and not self._iterations):
            self._latest = _LOG_PREFIX.sub("", line)[:70]
        if time.monotonic() - self._shown_at >= self._period:
            self._show()

    def close(self) -> None:
        """End the line that is redrawn in place."""
        if self._in_place:
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        elapsed = clock(self._shown_at - self._start)
        news = [self._at, self._latest] if self._at or self._latest else ["running"]
        text = f"  {elapsed} · {' · '.join(filter(None, news))}"
        if self._in_place:
            print(f"\r\x1b[K{text[:100]}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)


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
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove the demo's folder.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
