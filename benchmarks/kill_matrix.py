#!/usr/bin/env python
"""Disturb small runs in every way, resume them, and compare the end with that of undisturbed ones.

python benchmarks/kill_matrix.py --repeats 2 --output output/kill_matrix

{pretraining, FPN detector, C4 detector} x {SIGKILL, USR1, TERM, SIGKILL during a checkpoint's
write, a signal during an evaluation, a full disk} x {1, 2 processes} x repeats, on the CPU with one
thread per process. Every run is struck once, at a random moment, and resumed with the same command;
its last checkpoint (weights, optimizer, schedule, average) and its evaluations are to be identical,
bit for bit, to those of a run that was not. Prints the table, and writes it as kill_matrix.md and
kill_matrix.json. "Signal to exit" ends with the last process. Runs are forked from a process that
has imported everything: what they take does not have the seconds of `import torch` in it.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.faults import FAULTS, Fault, Missed, small_disk  # noqa: E402
from tests.e2e.forked_runs import Forkserver, shared_server  # noqa: E402
from tests.e2e.kill_cases import CASES, Case, Run, World  # noqa: E402
from tests.e2e.killing import differences  # noqa: E402

ATTEMPTS = 8  # until the blow hits
DISK = 64  # MiB; the checkpoints of a run are 25


@dataclass
class Result:
    """A disturbed run.

    Attributes:
        identical: whether it ended as the undisturbed one.
        seconds: from the signal to the end of the last process; None where there was no signal.
        attempts: how often it was begun until the blow hit.
        problem: why it is not identical, or was lost.
    """

    case: str
    fault: str
    processes: int
    repeat: int
    identical: bool
    seconds: float | None
    attempts: int
    problem: str = ""


class Matrix:
    """Runs the cells; undisturbed runs once for each case and number of processes."""

    def __init__(self, server: Forkserver, folder: Path, disk: Path, seed: int):
        self._server, self._folder, self._disk, self._seed = server, folder, disk, seed
        self._world = World(folder / "world")
        self._ends: dict[tuple[str, int], tuple[dict, dict]] = {}

    def cell(self, case: Case, fault: Fault, processes: int, repeat: int) -> Result:
        """Strike a run until it is hit, resume it, compare."""
        end = self._undisturbed(case, processes)
        rng = random.Random(f"{self._seed} {case.name} {fault.name} {processes} {repeat}")
        result = Result(case.name, fault.name, processes, repeat, False, None, 0)
        try:
            run = self._hit(case, fault, processes, rng, result)
            run.finish()
            result.problem = _compare(end, (run.final(), run.evaluations()))
        except Exception as error:
            result.problem = f"{type(error).__name__}: {error}"
        result.identical = not result.problem
        return result

    def _hit(
        self, case: Case, fault: Fault, processes: int, rng: random.Random, result: Result
    ) -> Run:
        folder = self._disk if fault.name == "disk full" else self._folder / "runs"
        while True:
            result.attempts += 1
            run = self._run(case, folder / "disturbed", processes)
            run.start()
            try:
                struck = fault.strike(run, case, rng)
                codes = run.wait()
                if struck is not None:
                    result.seconds = max(p.ended for p in run.processes) - struck
                fault.check(run, case, codes)
            except Missed:
                for process in run.processes:
                    process.send(9)
                run.wait()
                if result.attempts == ATTEMPTS:
                    raise
                continue
            return run

    def _undisturbed(self, case: Case, processes: int) -> tuple[dict, dict]:
        key = case.name, processes
        if key not in self._ends:
            run = self._run(case, self._folder / "runs" / "undisturbed", processes)
            run.finish()
            self._ends[key] = run.final(), run.evaluations()
        return self._ends[key]

    def _run(self, case: Case, output: Path, processes: int) -> Run:
        output.parent.mkdir(parents=True, exist_ok=True)
        run = Run(self._server, self._world.command(case, output), output, processes)
        shutil.rmtree(output, ignore_errors=True)
        run.log.unlink(missing_ok=True)
        run.marker.unlink(missing_ok=True)
        return run


def _compare(expected: tuple[dict, dict], found: tuple[dict, dict]) -> str:
    """What differs in checkpoint and evaluations; "" where nothing does."""
    names = list(differences(expected[0], found[0]))
    names += [
        f"{k}: {expected[1].get(k)}, {found[1].get(k)}"
        for k in expected[1] | found[1]
        if expected[1].get(k) != found[1].get(k)
    ]
    if len(expected[0]["model"]) < 50 or not expected[1]:
        names.append("nothing was compared")
    return ", ".join(names[:5])


def table(results: list[Result]) -> str:
    """Markdown: a line a cell."""
    lines = ["| run | fault | processes | runs | identical | signal to exit: median, max |"]
    lines.append("|---|---|---|---|---|---|")
    cells: dict[tuple, list[Result]] = {}
    for result in results:
        cells.setdefault((result.case, result.fault, result.processes), []).append(result)
    for (case, fault, processes), members in cells.items():
        times = [r.seconds for r in members if r.seconds is not None]
        shown = f"{statistics.median(times):.2f} s, {max(times):.2f} s" if times else ""
        identical = sum(r.identical for r in members)
        lines.append(f"| {case} | {fault} | {processes} | {len(members)} | {identical} | {shown} |")
    lost = [r for r in results if not r.identical]
    lines += ["", f"{len(results)} runs, {len(lost)} of them lost or different."]
    lines += [f"- {r.case}, {r.fault}, {r.processes}: {r.problem}" for r in lost]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2, help="of each cell (default 2: 72 runs)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="folder for the table; none: only printed")
    args = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with small_disk(folder / "disk", DISK):
            matrix = Matrix(shared_server(), folder, folder / "disk", args.seed)
            for case in args.cases:
                for processes in args.processes:
                    for fault in args.faults:
                        for repeat in range(args.repeats):
                            start = time.monotonic()
                            result = matrix.cell(CASES[case], FAULTS[fault], processes, repeat)
                            results.append(result)
                            print(f"{result} in {time.monotonic() - start:.1f} s", flush=True)
    text = table(results)
    print(f"\n{text}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "kill_matrix.md").write_text(text + "\n")
        content = json.dumps([asdict(result) for result in results], indent=1)
        (args.output / "kill_matrix.json").write_text(content + "\n")
    if not all(result.identical for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted is unmounted
    main()
