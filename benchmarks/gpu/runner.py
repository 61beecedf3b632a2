"""Run the steps, each in a process group of its own with its own time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

from virtex_d2.engine.files import atomic_path

from .plan import STEPS, limit
from .report import line, summary

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 5.0  # seconds between TERM and KILL
# A step is one process, whatever has started the check.
_LAUNCHERS = ("SLURM_", "SRUN_", "TORCHELASTIC_", "MASTER_")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "VIRTEX_REQUEUE_MARKER")


def run_steps(
    names: list[str],
    seconds: float,
    output: Path,
    options: Mapping[str, str],
    before: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run steps, writing check_gpu.json after each, and summary.md at the end.

    Args:
        names: of STEPS, in their order.
        seconds: for all of them together.
        output: folder of the results; the steps' own files are in its `work`.
        options: of `benchmarks.gpu.step`: device, captions, voc.
        before: results by name of what was done before, such as the nodes'.
        say: gets a line for each step.

    Returns:
        What is in check_gpu.json.
    """
    end = time.monotonic() + seconds
    results: dict[str, Any] = dict(before or {})
    found = {"started": time.strftime("%Y-%m-%d %H:%M %Z"), "seconds": seconds, "steps": results}
    running: set[subprocess.Popen] = set()
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)

    futures: dict[str, Future] = {}

    def step(name: str) -> tuple[str, dict[str, Any]]:
        if STEPS[name].needs in futures:
            wait([futures[STEPS[name].needs]])
        following = names[names.index(name) + 1 :]
        allowed = limit(name, following, end - time.monotonic())
        if allowed is None:
            return name, {"state": "NOT RUN", "headline": "no time left: raise --minutes"}
        return name, run_step(name, allowed, work, output / "log.txt", options, running)

    def keep(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        found["steps"] = {key: results[key] for key in (*(before or {}), *names) if key in results}
        say(line(name, result))
        found["passed"] = all(result["state"] == "PASS" for result in results.values())
        found["complete"] = len(results) == len(names) + len(before or {})
        _write(output / "check_gpu.json", json.dumps(found, indent=1))

    keep(*step(names[0]))
    # On a CPU seconds say nothing of the machine, so that two steps may share it.
    at_once = 2 if results[names[0]].get("device") == "cpu" else 1
    if at_once == 2:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    with ThreadPoolExecutor(at_once) as threads:
        try:
            for name in names[1:]:
                futures[name] = threads.submit(step, name)
            for future in as_completed(futures.values()):
                keep(*future.result())
        except BaseException:  # told to end: no step may be left behind
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                end_group(process)
            raise
    _write(output / "summary.md", summary(found))
    return found


def run_step(
    name: str,
    allowed: float,
    work: Path,
    log: Path,
    options: Mapping[str, str],
    running: set[subprocess.Popen],
) -> dict[str, Any]:
    """One step; its processes are ended at the latest after `allowed` seconds.

    Args:
        running: has its process while it runs.

    Returns:
        Its record with `state`: PASS where all checks, of which there are some, have passed and it
        came to its end; else FAIL.
    """
    record = work / f"{name}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.step", name, "--folder", str(work)]
    command += ["--seconds", f"{allowed:.0f}", "--parent", str(os.getpid())]
    command += [word for key, value in options.items() if value for word in (f"--{key}", value)]
    start = time.monotonic()
    code: int | None = None
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n==== {name}: {STEPS[name].what}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=_alone(), stdout=file, stderr=file, start_new_session=True
        )
        running.add(process)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(allowed)
        finally:  # also where this process is told to end
            end_group(process)
            running.discard(process)
    result = json.loads(record.read_text()) if record.is_file() else {"checks": []}
    result |= {"seconds": round(time.monotonic() - start, 1), "limit": round(allowed)}
    if code is None or not result.pop("ended", False):
        told = "its time limit" if code is None else f"a crash, exit code {code}"
        result["checks"].append({"name": "comes to its end", "passed": False, "told": told})
    checks = result["checks"]
    result["state"] = "PASS" if checks and all(check["passed"] for check in checks) else "FAIL"
    return result


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started: TERM, and after some seconds KILL."""
    deadline = time.monotonic() + PATIENCE
    number = signal.SIGTERM
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        while True:
            os.killpg(process.pid, number)
            process.poll()
            if number == signal.SIGKILL:
                break
            time.sleep(0.1)
            number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
    process.wait()


def _alone() -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_LAUNCHERS) and key not in _RANKS
    }
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
