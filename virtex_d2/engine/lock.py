"""One live run in an output folder: a lock that outlives no run, and says who holds it.

A lease of filelock's: a file that its holder touches every few seconds. Nothing depends on what
network file systems implement differently (flock), nor on the clocks of machines.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from virtex_d2.engine.errors import InputError

NAME = "run.lock"


class RunLock:
    """The lock of one folder.

    Args:
        folder: of the run; must exist.
        on_lost: called, in a thread, with an InputError when this run does not hold the folder any
            more: another may write there, so that this one has to end.
        key: the config key or flag that names the folder, for messages.
        part: of a folder that several runs share, the one that is locked; "": all of it. A file
            name's beginning, which may have folders that exist before it.

    Attributes:
        beat: seconds between signs of life.
        stale: seconds without one after which a holder on another machine is dead.
    """

    beat = 5.0
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
        self._lease = SoftFileLease(
            self.path,
            lease_duration=self.stale,
            heartbeat_interval=self.beat,
            on_compromise=self._lost,
            thread_local=False,  # a run that fails may be ended, and release it, in any thread
        )

    def acquire(self) -> None:
        """Take the lock; where its holder may be dead, wait until that is known."""
        begun, seen = time.monotonic(), None
        while True:
            try:
                # takes over from a process of this machine that is gone, and from any other one
                # that this object has seen silent for as long as `stale`
                self._lease.acquire(timeout=0)
                return
            except Timeout:
                pass
            touched = self._touched()
            if touched is None:
                continue  # it has been released, or was a dead one's and is removed
            if seen is not None and touched != seen:
                raise InputError(
                    f"{self._place}: another run is writing it: {self._holder()}. Stop that one, "
                    f"or choose another {self._key}."
                )
            if seen is None:
                seen = touched
                text = f"{self.path}: held by {self._holder()}. Watching whether it lives ..."
                print(text, file=sys.stderr, flush=True)
            if self._lease.owner is None and time.monotonic() > begun + self.stale:
                self._lease.break_lock()  # without a name in it: left by a machine that crashed
            time.sleep(min(1.0, self.beat / 4))

    def release(self) -> None:
        """Give the lock back; nothing where it is lost, or in a forked process."""
        self._lease.release(force=True)

    def _lost(self, compromise: LeaseCompromise) -> None:
        taken = f"taken over by {self._holder()}" if self._lease.owner else "removed"
        self._on_lost(
            InputError(
                f"{self._place}: the lock {self.path.name} was {taken} ({compromise.reason}). This "
                "run ends, so as not to write over another's files; --resume goes on."
            )
        )

    def _holder(self) -> str:
        owner = self._lease.owner
        if owner is None:
            return "an unknown process"
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"

    def _touched(self) -> float | None:
        try:
            with open(self.path, "rb") as file:  # NFS asks the server when a file is opened
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None


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
