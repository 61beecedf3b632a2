"""Files of training's state, written beside training."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from virtex_d2.engine.snapshot import Snapshot

State = Mapping[str, Any]


class StateWriter:
    """Writes states one after the other: in place, or in a thread while training goes on.

    In the thread it writes a copy (`Snapshot`), for which the CPU's memory must have room once
    more. A thread and no process: a forked one could not use CUDA nor be sure of its locks, and a
    spawned one would need the tensors in shared memory, of which containers have little. It holds
    Python's lock only between the large writes. It logs nothing, because loader workers are forked
    while it runs.

    An error of the thread is raised by the next `check`, `wait` or `write`, in the caller's thread.
    The interpreter's end waits for the thread; `os._exit` and signals do not: before these, `wait`.

    Args:
        background: whether to write in a thread.
    """

    def __init__(self, background: bool = False):
        self._snapshot = Snapshot() if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: State, action: Callable[[State], None]) -> None:
        """Wait for the write before, then call `action(state)`, or start to, with a copy.

        Raises:
            Exception: of `action` in place; else what the write before has raised.
        """
        self.wait()
        if self._snapshot is None:
            action(state)
            return
        copied = self._snapshot.take(state)
        # Not a daemon: what has been begun is finished before the interpreter ends.
        self._thread = threading.Thread(target=self._run, args=(action, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until all is on disk.

        Raises:
            Exception: what the thread has raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Without waiting: whether a write has failed.

        Raises:
            Exception: what the thread has raised; once.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[State], None], state: State) -> None:
        try:
            action(state)
        except BaseException as error:
            self._error = error
