"""Runs the stages, a process each: progress on the terminal, everything in a log, done once.

A stage that has ended well leaves a marker with the fingerprint of its command and configs; the
next call skips it. One that was stopped goes on with the tool's --resume, or writes its files anew.
Two processes never run the same stage at the same time: each is locked while it runs.
"""

import contextlib
import os
import queue
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.lock import RunLock
from virtex_d2.engine.topology import tasks_of_step
from virtex_d2.studies.pipeline.markers import FOLDER, checked_marker, read_record, write_record
from virtex_d2.studies.pipeline.process import StageProcess
from virtex_d2.studies.pipeline.progress import Progress, clock
from virtex_d2.studies.pipeline.stage import Stage, grouped

_MAKING = 1.0  # seconds in which another process has surely written its record


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
    """Around what a tool does with stages: end with a message instead of a traceback.

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


def claim_output(output: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Make `output` the folder of this piece of work, or make sure that it is already.

    Args:
        output: the folder.
        kind: what it is, for people and for the name of its record: "demo".
        settings: what may not change between two calls.
    """
    _refuse_several(kind, os.environ)
    record = output / f"{kind}.json"
    _await_record(record)
    if record.is_file():
        found = read_record(record)
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
    write_record(record, settings)


def _refuse_several(kind: str, environ: Mapping[str, str]) -> None:
    tasks = tasks_of_step(environ)
    count, starter = (tasks, "srun") if tasks > 1 else (environ.get("WORLD_SIZE", "1"), "torchrun")
    if tasks > 1 or ("RANK" in environ and count != "1"):
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
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    lost: list[InputError] = []  # by the threads that keep the locks
    lock = RunLock(output, lost.append, key="--output")
    if alone:
        lock.acquire()
    try:
        return _run_locked(stages, root, output, slots, lost)
    finally:
        lock.release()


def _run_locked(
    stages: Sequence[Stage],
    root: Path,
    output: Path,
    slots: Sequence[Mapping[str, str]] | None,
    lost: list[InputError],
) -> dict[str, dict[str, Any]]:
    markers = {stage.name: checked_marker(stage, root, output) for stage in stages}
    numbers = {stage.name: number for number, stage in enumerate(stages, start=1)}
    for group in grouped(stages):
        places = slots or [{}] * len(group)
        share = min(len(places), len(group))
        runs = [
            StageProcess(stage, markers[stage.name], root, output, share, lost)
            for stage in group
            if not markers[stage.name].get("complete")
        ]
        kept = [stage for stage in group if markers[stage.name].get("complete")]
        for stage in kept:
            print(_title(stage, numbers, len(stages)), flush=True)
            print(f"  done before, in {clock(markers[stage.name]['seconds'])}: kept", flush=True)
        if runs:
            titles = {run.stage.name: _title(run.stage, numbers, len(stages)) for run in runs}
            _run_together(runs, places, titles, lost)
    return markers


def _title(stage: Stage, numbers: Mapping[str, int], count: int) -> str:
    return f"\n[{numbers[stage.name]}/{count}] {stage.title}"


def elapsed(stages: Iterable[Stage], markers: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of all stages; of those that ran at the same time the longest counts."""
    return sum(max(markers[stage.name]["seconds"] for stage in group) for group in grouped(stages))


def _run_together(
    runs: Sequence[StageProcess],
    slots: Sequence[Mapping[str, str]],
    titles: Mapping[str, str],
    lost: list[InputError],
) -> None:
    """Run processes, as many at the same time as there are slots.

    Where one fails, those that run come to their end, and no other begins.

    Raises:
        StageFailedError: a stage failed.
    """
    news: queue.SimpleQueue[tuple[StageProcess, str | None]] = queue.SimpleQueue()
    progress = Progress({run.stage.label: run.stage.iterations for run in runs})
    waiting, free = list(runs), list(slots)
    running: dict[str, tuple[StageProcess, Mapping[str, str]]] = {}
    failures: list[StageFailedError] = []
    try:
        while running or (waiting and not failures):
            if lost:
                raise lost[0]
            while waiting and free and not failures:
                run = waiting.pop(0)
                print(titles[run.stage.name], flush=True)
                try:
                    begun = run.start(lambda line, run=run: news.put((run, line)), free[0])
                except InputError as error:
                    failures.append(StageFailedError(str(error), EXIT_CODE))
                    continue
                progress.begin(run.stage.label)
                if begun:
                    running[run.stage.name] = run, free.pop(0)
                else:
                    progress.end(run.stage.label)
                    print("  done by another process meanwhile: kept", flush=True)
            try:
                run, line = news.get(timeout=1.0)
            except queue.Empty:
                progress.show()
                continue
            if line is None:
                _, slot = running.pop(run.stage.name)
                free.append(slot)
                code = run.end()
                progress.end(run.stage.label)
                if code:
                    failures.append(_failure(run, code))
                else:
                    print(f"  finished in {clock(run.seconds)}; log: {run.log}", flush=True)
            else:
                progress.update(line.strip(), run.stage.label)
    finally:
        progress.close()
        for run, _ in running.values():
            run.end(stop=True)
    if failures:
        codes = {failure.code for failure in failures}
        raise StageFailedError("\n".join(map(str, failures)), codes.pop() if len(codes) == 1 else 1)


def _failure(run: StageProcess, code: int) -> StageFailedError:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    refused = code == EXIT_CODE
    then = (
        "It refused what it was given, and would again: mend that first."
        if refused
        else "The same command goes on from here."
    )
    text = "\n".join(
        [
            f"the stage {run.stage.name} {how}. The end of its log:",
            *(f"  | {line}" for line in run.tail()),
            f"The whole log: {run.log}. There is no report. {then}",
        ]
    )
    return StageFailedError(text, EXIT_CODE if refused else 1)


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
