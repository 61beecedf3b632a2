"""Processes that do not outlive the one that started them.

A run whose parent is killed would go on unseen, beside the one that is started next. Imports only
the standard library.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
# Loaded before there is a fork, in which a thread that is gone may hold the loader's lock.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """In a child: get a signal as soon as the thread that started it is gone, even if by SIGKILL.

    Only Linux can do that; elsewhere nothing happens.

    Args:
        parent: the id of the process that started this one. If it is gone already, this one ends
            at once, with code 1.

    Raises:
        OSError: Linux refused.
    """
    if _libc is None:
        return
    if _libc.prctl(_PR_SET_PDEATHSIG, int(number)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:  # gone before that was asked for
        os._exit(1)
