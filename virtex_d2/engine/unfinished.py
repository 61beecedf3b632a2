"""How a process ends whose run has stopped on purpose.

Apart from `virtex_d2.engine.stopping`, which imports detectron2's trainers: what only starts other
processes and waits for them need not wait for that.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator

from virtex_d2.engine import signals

EXIT_UNFINISHED = 75  # EX_TEMPFAIL of <sysexits.h>: try again later


class Unfinished(SystemExit):
    """Ends a process whose run has stopped on purpose, with exit code 75. Raised in all of them."""

    def __init__(self) -> None:
        super().__init__(EXIT_UNFINISHED)


@contextlib.contextmanager
def exit_at_once_if_unfinished() -> Iterator[None]:
    """Around all that a tool does: ends the process when the body has come to `Unfinished`.

    Without the interpreter's own shutdown: with torch and detectron2 loaded that takes seconds on a
    busy machine, of the few that a scheduler leaves. Everything has been written and closed before.
    """
    try:
        yield
    except SystemExit as end:
        if end.code != EXIT_UNFINISHED:
            raise
        signals.ignore()
        for helper in multiprocessing.active_children():  # loader workers
            helper.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_UNFINISHED)
