"""The process of one stage, with its lock, its marker and its log."""

import functools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from virtex_d2.engine.cli import shell
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.lock import RunLock
from virtex_d2.engine.parent import end_with_parent
from virtex_d2.studies.pipeline.markers import FOLDER, checked_marker, marker_path, write_record
from virtex_d2.studies.pipeline.stage import Stage, argv

LOG_TAIL = 25  # lines shown of a failed stage

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


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


class StageProcess:
    """A stage's process, its log and its marker, which is kept up to date.

    Args:
        stage: what to run.
        marker: of an earlier run that was stopped, or empty; changed in place.
        root, output: the project's folder, and that of markers and logs.
        processes: how many share the machine.
        lost: where to tell that another process has taken the stage over.
    """

    def __init__(
        self,
        stage: Stage,
        marker: dict,
        root: Path,
        output: Path,
        processes: int,
        lost: list[InputError],
    ):
        self.stage = stage
        self.log = output / "logs" / f"{stage.name}.log"
        self._marker, self._root, self._output = marker, root, output
        self._environment = environment(root, processes)
        self._lock = RunLock(output, lost.append, "--output", f"{FOLDER}/{stage.name}")

    def start(self, tell: Callable[[str | None], None], slot: Mapping[str, str]) -> bool:
        """Start the process; `tell` gets each line of its output, and None at its end.

        Returns:
            False where another process has done the stage meanwhile: nothing is started.
        """
        self._lock.acquire()
        try:
            # Only now is it known that nobody else changes it.
            self._marker.update(checked_marker(self.stage, self._root, self._output))
            if self._marker.get("complete"):
                self._lock.release()
                return False
            self._start(tell, slot)
        except BaseException:
            self._lock.release()
            raise
        return True

    def _start(self, tell: Callable[[str | None], None], slot: Mapping[str, str]) -> None:
        stage, again = self.stage, bool(self._marker)
        command = argv(stage, self._root, again)
        print(f"  {shell(command)}", flush=True)
        self._seconds_before = self._marker.get("seconds", 0.0)
        self._marker.update(
            fingerprint=stage.fingerprint(self._root),
            made_of=stage.made_of(self._root),
            command=shell(argv(stage, self._root)),
            seconds=self._seconds_before,
            threads=self._environment["OMP_NUM_THREADS"],
            complete=False,
        )
        self._record()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.log, "a" if again else "w", encoding="utf-8")  # noqa: SIM115  see end
        self._log_begins = self._file.tell()
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=self._root,
            env={**self._environment, **slot},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=functools.partial(end_with_parent, signal.SIGTERM, os.getpid()),
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
        self._marker["seconds"] = self._seconds_before + time.monotonic() - self._started
        self._record()
        self._lock.release()
        return code

    def tail(self) -> list[str]:
        """The last lines of what this process has written into the log."""
        with open(self.log, "rb") as file:
            file.seek(self._log_begins)
            return file.read().decode("utf-8", errors="replace").splitlines()[-LOG_TAIL:]

    def _record(self) -> None:
        write_record(marker_path(self.stage, self._output), self._marker)
