"""Forks processes that have everything imported already: for tests that start many.

Reads a request (a line of JSON) at a time from stdin, answers with the exit codes:

    {"main": "crash", "timeout": 60, "processes":
        [{"env": {"RANK": "0"}, "arguments": ["--resume"], "folder": "...", "output": "...",
          "replace": {"virtex_d2.engine.preflight.code": "other_code"}}]}

`main` and what replaces a function of the project are names in `rank_programs`.
"""

import importlib
import json
import os
import signal
import sys
import time

import virtex_d2  # noqa: F401
from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.distributed import launch
from virtex_d2.engine.errors import exit_on_input_error


def fork(main: str, process: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{process['output']}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    os.environ.update(process["env"])
    os.chdir(process["folder"])
    code = 1
    try:
        programs = importlib.import_module("tests.engine.rank_programs")
        for replaced, name in process["replace"].items():
            module, _, function = replaced.rpartition(".")
            setattr(importlib.import_module(module), function, getattr(programs, name))
        with exit_on_input_error():
            launch(getattr(programs, main), argument_parser().parse_args(process["arguments"]))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def collect(pids: list[int], timeout: float) -> list[int]:
    """Exit codes; minus the number of the signal of those that were killed.

    We kill what has not ended after the timeout.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    for module in ("tests.engine.rank_programs", "virtex_d2.engine.run"):
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pids = [fork(request["main"], process) for process in request["processes"]]
        print(json.dumps(collect(pids, request["timeout"])), flush=True)
