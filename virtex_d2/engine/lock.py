"""One live run in an output folder: a lock that outlives no run, and says who holds it.

A file with who holds it, touched every few seconds by a thread. Nothing depends on what network
file systems implement differently (flock), nor on the clocks of machines: ages are differences of
times that the file system gave.
"""

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)

NAME = "run.lock"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: of this taking of the lock.
        host, pid: the process.
        process: tells it from later ones with the same pid: boot of the machine, pid namespace and
            time of its start; "" where the system has no /proc.
        job: Slurm's cluster and job; "" outside of Slurm.
        restarts: how often the job was requeued before.
        since: date and time, for people.
    """

    token: str
    host: str
    pid: int
    process: str
    job: str
    restarts: int
    since: str

    @classmethod
    def this_process(cls, environment: Mapping[str, str] = os.environ) -> "Holder":
        job = environment.get("SLURM_JOB_ID", "")
        return cls(
            token=uuid.uuid4().hex,
            host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            pid=os.getpid(),
            process=" ".join((*_system(), _started(os.getpid()))) if _system() else "",
            job=f"{environment.get('SLURM_CLUSTER_NAME', '')}:{job}" if job else "",
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )

    def __str__(self) -> str:
        job = f" (Slurm job {self.job.rpartition(':')[2]})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be told from here."""
        here = _system()
        if not self.process or not here or self.process.split()[:-1] != here:
            return None
        return _started(self.pid) == self.process.split()[-1]

    def succeeds(self, other: "Holder") -> bool:
        """Whether this is the same Slurm job, requeued: its earlier processes are gone."""
        return bool(self.job) and self.job == other.job and self.restarts > other.restarts


class RunLock:
    """The lock of one folder.

    Args:
        folder: of the run; must exist.
        on_lost: called, in a thread, with an InputError when another run has taken the folder.
        key: the config key or flag that names the folder, for messages.
        part: of a folder that several runs share, the one that is locked; "": all of it. A file
            name's beginning, which may have folders that exist before it.

    Attributes:
        beat: seconds between signs of life.
        stale: seconds without one after which a holder on another machine is dead.
    """

    beat = 15.0
    stale = 180.0

    def __init__(
        self,
        folder: str | os.PathLike,
        on_lost: Callable[[InputError], None],
        key: str = "OUTPUT_DIR",
        part: str = "",
    ):
        self.path = Path(folder) / (f"{part}.lock" if part else NAME)
        self._place = f"{key} {folder}" + (f", {Path(part).name}" if part else "")
        self._key = key
        self._on_lost = on_lost
        self._me = Holder.this_process()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock; where its holder may be dead, wait until that is known."""
        while not self._create():
            holder = self._read()
            if holder is not None and not holder.token:
                time.sleep(1)  # it may be in the middle of being written
                holder = self._read()
            if holder is not None and self._is_dead(holder):
                self._remove(holder)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; nothing where it is lost, or in a forked process."""
        if os.getpid() != self._me.pid:
            return
        self._released.set()
        with contextlib.suppress(OSError):
            holder = self._read()
            if holder is not None and holder.token == self._me.token:
                self.path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self._me), file)
        return True

    def _read(self, path: Path | None = None) -> Holder | None:
        """Who holds the lock; None where nobody does."""
        try:
            content = json.loads((path or self.path).read_text(encoding="utf-8"))
            return Holder(**{field.name: content[field.name] for field in fields(Holder)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            # Being written, or left by a full disk: judged by its age alone.
            return Holder("", "an unknown machine", 0, "", "", 0, "an unknown time")

    def _is_dead(self, holder: Holder) -> bool:
        """Raise InputError if it lives."""
        alive = holder.alive()
        if alive is False or self._me.succeeds(holder):
            logger.info("%s: its holder is gone (%s).", self.path, holder)
            return True
        first = self._touched()
        if alive is None and first is not None:
            age = self._now() - first
            if age < self.stale:
                say = f"{self.path}: held by {holder}, last sign of life {max(age, 0):.0f} s ago."
                print(f"{say} Watching whether it lives ...", file=sys.stderr, flush=True)
            while self._now() - first < self.stale:
                time.sleep(min(1.0, self.beat / 4))
                touched = self._touched()
                if touched is None:
                    return False  # released
                if touched != first:
                    alive = True
                    break
        if alive:
            raise InputError(
                f"{self._place}: another run is writing it: {holder}. Stop that one, or choose "
                f"another {self._key}."
            )
        logger.info("%s: no sign of life for %.0f s (%s).", self.path, self.stale, holder)
        return True

    def _remove(self, holder: Holder) -> None:
        """Remove a dead run's lock, and not that of one which was faster to do so."""
        aside = self.path.with_name(f"{TEMPORARY_PREFIX}{NAME}-{self._me.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        found = self._read(aside)
        if found is not None and found.token != holder.token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _touched(self) -> float | None:
        try:
            with open(self.path, "rb") as file:  # NFS asks the server when a file is opened
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The file system's time."""
        probe = self.path.with_name(f"{TEMPORARY_PREFIX}{NAME}-now-{self._me.token}")
        try:
            probe.write_text("")
            return os.stat(probe).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._released.wait(self.beat):
            try:
                if not self._leave_sign():
                    return
            except OSError as error:  # of a file system that may recover
                logger.warning("%s: no sign of life could be left: %s", self.path, error)

    def _leave_sign(self) -> bool:
        """Touch the lock; False where it is another's, or released meanwhile."""
        holder = self._read()
        if holder is not None and holder.token == self._me.token:
            os.utime(self.path)
            return True
        if self._released.is_set():
            return False
        if holder is None and self._create():
            logger.warning("%s was removed; this run goes on, and holds it again.", self.path)
            return True
        self._on_lost(
            InputError(
                f"{self._place}: another run has taken it over: {self._read()}. This one "
                "had left no sign of life for so long that it was taken for dead; it ends now, so "
                "as not to write over the other's files."
            )
        )
        return False


_held: dict[Path, RunLock] = {}


def lock_folder(folder: str | os.PathLike, on_lost: Callable[[InputError], None]) -> None:
    """Hold the lock of a folder until `release_locks`; twice in one process is once."""
    key = Path(folder).resolve()
    if key in _held:
        return
    lock = RunLock(folder, on_lost)
    lock.acquire()
    _held[key] = lock


def release_locks() -> None:
    """Give back every lock that this process holds."""
    while _held:
        _held.popitem()[1].release()


atexit.register(release_locks)  # `launch` has done so; not everybody who sets a run up launches it


def _system() -> list[str]:
    """This boot of this machine, and this pid namespace; [] where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return []


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; "" where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name, in parentheses, may hold anything; state and start time follow as fields 3 and 22.
    after = stat.rpartition(")")[2].split()
    return "" if after[0] in "ZX" else after[19]
