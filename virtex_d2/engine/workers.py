"""Loader workers: where they meet their training process, and what ends a wait for them.

A worker hands its batch over in a thread that Python runs behind its back, where an error costs the
batch and nothing else, so that the training process would wait for it forever.
"""

import contextlib
import multiprocessing.queues
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import util
from typing import Any, TypeVar

from torch._utils import ExceptionWrapper

from virtex_d2.engine import signals
from virtex_d2.engine.errors import InputError

Batch = TypeVar("Batch")

PATIENCE = 20  # seconds that a batch may take once a signal has come; schedulers give 30 and more

# Bytes that the name of a Unix socket may have (unix(7)), less "/pymp-xxxxxxxx/listener-xxxxxxxx".
_LONGEST_FOLDER = 107 - 32
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def batches_of(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """The batches of a loader, whose workers `start` starts; it makes the loader's iterator.

    Signals are noted, to be read between two iterations; while no batch comes, they end the run.
    """
    _require_short_sockets()
    iterator = signals.held_back(start)
    # Signals come to the main thread alone.
    main = threading.current_thread() is threading.main_thread()
    try:
        while True:
            with signals.interruptible(PATIENCE) if main else contextlib.nullcontext():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
    except signals.Interrupted:
        raise InputError(
            f"{signals.received()} has come while the next batch was awaited, and in {PATIENCE} s "
            "no batch: the run ends. Is the file system of the data gone? --resume goes on from "
            "the last checkpoint."
        ) from None
    finally:
        del iterator  # a traceback that is kept would keep its workers


def start_worker(_: int = 0) -> None:
    """In a loader's worker: `signals.start_helper`; and what it cannot hand over is no silence."""
    signals.start_helper()
    # Called as a method of the queue, by the thread that feeds it.
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error


class _NotHandedOver(ExceptionWrapper):
    """In the place of a batch: raised where it was to arrive."""

    def reraise(self) -> None:
        reason = self.exc_msg.strip().splitlines()[-1]
        raise InputError(
            f"a loader worker cannot hand its batch over: {reason}. Batches go through /dev/shm "
            "(df /dev/shm; --shm-size of containers), which fewer workers fill less; and each "
            "tensor takes an open file (ulimit -n)."
        )


def _hand_over_error(queue: Any, error: Exception, batch: Any) -> None:
    queue.put((batch[0], _NotHandedOver()))


def _require_short_sockets() -> None:
    """Let workers' sockets lie in a folder whose name leaves room for theirs."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return
    for short in _SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            util.get_temp_dir()  # made once; this process and its workers keep to it
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = folder
    raise InputError(
        f"TMPDIR {folder} has {len(folder)} characters; loader workers' sockets have room for "
        f"{_LONGEST_FOLDER}, and none of {', '.join(_SHORT_FOLDERS)} can be written to. Set a "
        "shorter TMPDIR, or use no workers."
    )
