"""Start a run's processes, however that was asked for, and end them together.

torchrun, srun or `torch.multiprocessing` start processes and end the others when one fails;
`torch.distributed` connects them. Added here is what makes a failure tell: whose it was, once.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing, nn

from virtex_d2.engine import preflight, signals
from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.lock import release_locks
from virtex_d2.engine.parent import end_with_parent
from virtex_d2.engine.topology import (
    COLLECTIVE_TIMEOUT,
    LAUNCH_TIMEOUT,
    Machine,
    Place,
    resolve,
)
from virtex_d2.engine.unfinished import EXIT_UNFINISHED

GRACE = 5  # seconds for the others to have read about a failure before the meeting place is gone
LAST_WORDS = 15  # seconds that processes have to end by themselves after a failure
STACKS = signal.SIGUSR2  # to a process of a run: write the stacks of all threads to stderr

# torch's flight recorder of NCCL's collectives, written when one waits in vain. Each name as it was
# up to torch 2.8 and as it is later; what the environment says already stays.
_RECORDS = os.path.join(tempfile.gettempdir(), "nccl_trace_rank_")  # torch adds the rank
_FLIGHT_RECORDER = {
    f"TORCH_{name}": value
    for names, value in (
        (("NCCL_TRACE_BUFFER_SIZE", "FR_BUFFER_SIZE"), "2000"),
        (("NCCL_DUMP_ON_TIMEOUT", "FR_DUMP_ON_TIMEOUT"), "1"),
        (("NCCL_DEBUG_INFO_TEMP_FILE", "FR_DUMP_TEMP_FILE"), _RECORDS),
    )
    for name in names
}
_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_OF_PEERS = re.compile(r"gloo|nccl|c10d|store|by peer", re.IGNORECASE)

Main = Callable[[argparse.Namespace], Any]

_description = ["Processes: one."]


def launch(main: Main, args: argparse.Namespace) -> None:
    """Call `main(args)` in every process of the run, with detectron2's `comm` ready.

    `engine.topology.resolve` says which processes: of torchrun, of srun with a task per process or
    per node, of detectron2's flags, or this one alone. They meet, check that they fit together
    (`engine.preflight`), and communicate over NCCL where there are GPUs, else over gloo.

    An exception in one process ends it with its exit code, and whoever has started it ends the
    others. A SystemExit with code 0 or 75 (stopped on purpose, to go on later) is an end like that
    of `main`: all processes have to come to it.

    Args:
        main: a function of a module, as processes that are started here import it.
        args: of `engine.cli.argument_parser`.

    Raises:
        SystemExit: in a run of several processes, where it does not end well.
    """
    if getattr(args, "check", False):
        main(args)  # of what another machine is to run: here, whatever this one has
        return
    faulthandler.enable(2)  # torch ends processes by SIGABRT that wait too long for NCCL
    faulthandler.register(STACKS, 2)
    gpus = 0 if _asks_for_cpu(args) or not torch.cuda.is_available() else torch.cuda.device_count()
    place = resolve(args, os.environ, Machine(socket.gethostname(), gpus, os.getpid()))
    try:
        if place.start:
            _start_processes(main, args, place)
        elif place.world_size > 1:
            _take_part(main, args, place)
        else:
            _description[:] = ["Processes: one.", *([place.note] if place.note else [])]
            main(args)
    finally:
        release_locks()


def describe() -> list[str]:
    """The processes of this run and what was found out about them, in lines for the log."""
    return list(_description)


def wrap_ddp(model: nn.Module, unused_parameters: bool = False) -> nn.Module:
    """The model in DistributedDataParallel, on its own device; as it is where there is one process.

    Buffers (norm statistics) are not broadcast: each process keeps its own, as in detectron2.

    On CPUs gradients lie in the same buckets in every iteration. By default torch sorts them anew
    after the first one of every start, and of more than two processes the place of a gradient
    decides in which order its parts are added: a resumed run would differ from one that was not
    stopped. torch keeps the buckets as they are where it looks for unused parameters. On GPUs,
    where sums differ from run to run anyway, that search is not worth its time, unless a step may
    leave `unused_parameters`, on which torch raises otherwise.
    """
    from detectron2.engine import create_ddp_model

    device = next(model.parameters()).device
    fixed_buckets = comm.get_world_size() > 2 and device.type == "cpu"
    return create_ddp_model(
        model,
        # The device's number and not the local rank, which detectron2 takes: a task that sees one
        # GPU alone has it as the first, whatever its rank.
        device_ids=None if device.type == "cpu" else [device.index],
        broadcast_buffers=False,
        find_unused_parameters=fixed_buckets or unused_parameters,
        gradient_as_bucket_view=True,  # or each gradient is held twice
    )


def abort(error: InputError) -> NoReturn:
    """End this process, from any thread; whoever has started the others ends them."""
    _say(f"error: {error}")
    _leave_now(EXIT_CODE)


def _take_part(main: Main, args: argparse.Namespace, place: Place) -> None:
    """Be one of the run's processes, from meeting the others to leaving them."""
    patience = getattr(args, "launch_timeout", LAUNCH_TIMEOUT)
    timeout = timedelta(seconds=getattr(args, "collective_timeout", COLLECTIVE_TIMEOUT))
    if place.gpu is not None:
        torch.cuda.set_device(place.gpu)  # before anything makes a context on the first one
        for name, value in _FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    rank = _Rank(place)
    stopped: SystemExit | None = None
    try:
        rank.meet(patience)
        rank.join(timeout, patience)
        main(args)
    except SystemExit as error:
        if error.code not in (None, 0, EXIT_UNFINISHED):
            rank.fail(error)
        stopped = error
    except BaseException as error:
        rank.fail(error)
    # not a collective: one process may have much to do alone at the end
    rank.leave(timeout.total_seconds())
    release_locks()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped


class _Rank:
    """One of the run's processes, and its way to the meeting place, where a failure is told."""

    def __init__(self, place: Place):
        self._place = place
        self._store: dist.Store | None = None
        self._neighbours: list[int] = []  # ids of the machine's other processes

    def meet(self, patience: float) -> None:
        """Wait `patience` seconds for all to come; the first one names those that have not."""
        place, deadline = self._place, time.monotonic() + patience
        if not place.serves:
            _await_listener(place, deadline)
        opened = _store(place, patience, place.serves)
        self._store = store = dist.PrefixStore(f"virtex/{place.attempt}", opened)
        store.set(f"rank/{place.rank}", place.host)
        if place.rank == 0:
            absent = [rank for rank in range(place.world_size) if not _comes(store, rank, deadline)]
            problem = absent and (
                f"ranks {', '.join(map(str, absent))} of {place.world_size} have not come within "
                f"{patience:.0f} s (--launch-timeout). Were they started, and do they run yet? Can "
                f"their machines reach {place.host}?"
            )
            store.set("met", json.dumps([place.world_size, problem or ""]))
        size, problem = json.loads(store.get("met"))
        if problem:
            raise InputError(problem)
        if size != place.world_size:
            raise InputError(
                f"{place.name} was started as one of {place.world_size} processes, rank 0 as one "
                f"of {size}. Start all with the same sizes."
            )

    def join(self, timeout: timedelta, patience: float) -> None:
        """Make the process groups: all, over gloo too, and this machine's for detectron2's `comm`.

        Then check that the processes fit together, and that they reach each other.
        """
        place, on_gpu = self._place, self._place.gpu is not None
        preflight.check_interfaces(os.environ, on_gpu)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("groups", self._store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
        gloo = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else dist.group.WORLD
        # detectron2 would make it when it first needs it, with torch's own timeout.
        comm._get_global_gloo_group = lambda: gloo
        dist.monitored_barrier(gloo, timedelta(seconds=patience), wait_all_ranks=True)
        mine = preflight.identity(place)
        others = comm.all_gather(mine, gloo)
        preflight.check_records(others)
        nodes: dict[int, list[int]] = {}
        for rank, other in enumerate(others):
            nodes.setdefault(other["node"], []).append(rank)
        for ranks in nodes.values():  # every rank makes all, in one order
            group = dist.new_group(ranks, timeout=timeout)
            if place.rank in ranks:
                comm._LOCAL_PROCESS_GROUP = group
        seen_by = [o["process"] for o in others if o["process"][0] == mine["process"][0] != ""]
        self._neighbours = [pid for _, pid in seen_by if pid != os.getpid()]
        preflight.check_collectives(place.gpu)
        over = "NCCL" if on_gpu else "gloo"
        _description[:] = [
            f"Processes: {len(others)} on {len(nodes)} machine{'s' * (len(nodes) > 1)} "
            f"({place.launcher}), over {over}, "
            f"meeting at {place.address}:{place.port}.",
            *([place.note] if place.note else []),
            *(f"  {other['name']}: {other['device']}" for other in others),
            f"Preflight: all-reduce right; code {preflight.code_version()} and "
            f"{', '.join(map(' '.join, preflight.versions().items()))} everywhere.",
        ]

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of its exception, which is printed if it is the run's first."""
        place = self._place
        if _TIMEOUT.search(str(error)):  # in which somebody else hangs, or waits as well
            for pid in self._neighbours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, STACKS)
        text, code = _failure(error, place.name)
        first = None
        try:
            if self._store is not None and self._store.add("failed", 1) > 1:
                self._store.wait(["failure"], timedelta(seconds=GRACE))
                first = json.loads(self._store.get("failure"))
            elif self._store is not None:
                self._store.set("failure", json.dumps([text, code]))
        except RuntimeError:
            if _OF_PEERS.search(str(error)):
                text = (
                    f"{place.name} failed: rank 0, or what had started it, is gone, and with it "
                    f"the meeting place ({str(error).splitlines()[0]})"
                )
        if first is None:
            _say(text)
        else:
            text, code = first
            if place.rank == 0:  # in the log, and on the screen of who looks there alone
                logging.getLogger("virtex_d2").error("The run ends: %s", text)
            elif place.local_rank == 0:
                _say(f"{place.name} ends, because {text.splitlines()[-1]}")
        self.leave(GRACE if place.serves else 0)
        _leave_now(code)

    def leave(self, patience: float) -> None:
        """Wait until all have got here, for so many seconds: the meeting place goes with one."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(RuntimeError, AttributeError):  # it may be gone, or never was
            self._store.add("left", 1)
            while self._store.add("left", 0) < self._place.world_size:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)


def _failure(error: BaseException, who: str) -> tuple[str, int]:
    """What the user should read of an exception, and the exit code."""
    if isinstance(error, InputError):
        return f"error: {who}: {error}", EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        return f"{who}: interrupted", 130
    trace = "".join(traceback.format_exception(error)).rstrip()
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    return f"{who} failed:\n{trace}", code


def _store(place: Place, patience: float, serves: bool) -> dist.TCPStore:
    """Open the meeting place, or connect to it."""
    try:
        return dist.TCPStore(
            "localhost" if serves else place.address,
            place.port,
            is_master=serves,
            # the first one gives up after `patience`, and says more about it
            timeout=timedelta(seconds=patience + 30),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise InputError(
            f"port {place.port} of {place.host} is in use by another program, and the processes of "
            "this run were to meet there. Give a free one: --dist-url "
            f"tcp://{place.address}:PORT, or under torchrun --master-port."
        ) from error


def _await_listener(place: Place, deadline: float) -> None:
    """Wait until somebody listens: torch's own client fills the log with its failed attempts."""
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error) or "no answer"
                raise InputError(
                    f"{place.name} does not reach the meeting place at {place.address}:"
                    f"{place.port} ({reason}). Does the first process run, is that the name of its "
                    "machine (getent hosts), and does a firewall let the port through? --dist-url "
                    "tcp://ADDRESS:PORT names another place."
                ) from error
        time.sleep(0.1)


def _comes(store: dist.Store, rank: int, deadline: float) -> bool:
    left = max(0.1, deadline - time.monotonic())
    try:
        store.wait([f"rank/{rank}"], timedelta(seconds=left))
    except RuntimeError:
        return False
    return True


def _start_processes(main: Main, args: argparse.Namespace, place: Place) -> None:
    """Start this machine's processes, and end as they do.

    Raises:
        SystemExit: not all have ended with code 0.
    """
    server = None
    if place.serves:  # here, so that it stays open when any of the processes ends
        server = _store(place, getattr(args, "launch_timeout", LAUNCH_TIMEOUT), serves=True)
        place = replace(place, port=server.port)
    if place.gpu is None:  # they share the cores, unless somebody has said how
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.start)))
    signals.listen()  # what comes is passed on
    started = signals.held_back(  # until their main module listens
        lambda: multiprocessing.start_processes(
            _in_new_process, (main, args, place, os.getpid()), place.start, join=False
        )
    )
    code = _await_end(started.processes, place)
    del server
    if code:
        raise SystemExit(code)


def _in_new_process(
    local_rank: int, main: Main, args: argparse.Namespace, place: Place, parent: int
) -> None:
    end_with_parent(signal.SIGKILL, parent)
    faulthandler.enable(2)
    faulthandler.register(STACKS, 2)
    signals.release()
    _take_part(main, args, place.child(local_rank))


def _await_end(processes: Sequence[multiprocessing.Process], place: Place) -> int:
    """Wait until all have ended; those that outlive a failure by long are killed.

    What asks this process to stop is passed on.

    Returns:
        The exit code.
    """
    passed_on, deadline, ended = "", float("inf"), {}

    def note_ends() -> set[int]:
        for rank, process in enumerate(processes, start=place.rank):
            if process.exitcode is not None and rank not in ended:
                ended[rank] = _exit_code(process, f"rank {rank} on {place.host}")
        return set(ended.values()) - {0, EXIT_UNFINISHED}

    try:
        while living := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in living], timeout=0.2)
            if (name := signals.received()) != passed_on:
                passed_on = name
                _send(living, signal.Signals[f"SIG{name}"])
            if note_ends() and deadline == float("inf"):
                deadline = time.monotonic() + LAST_WORDS
            if time.monotonic() > deadline:
                _send(living, STACKS)
                time.sleep(1)
                break
        else:
            note_ends()
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Bad input (2) and signals (128 and more) tell more than what followed from them (1).
    return max(set(ended.values()) - {0, EXIT_UNFINISHED} or ended.values())


def _send(processes: Sequence[multiprocessing.Process], number: signal.Signals) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _exit_code(process: multiprocessing.Process, name: str) -> int:
    """As a shell has it; says so where a process was killed, as it could not say it itself."""
    number = -process.exitcode
    if number <= 0:
        return process.exitcode
    hint = "; out of memory? see `dmesg`" if number == signal.SIGKILL else ""
    what = f"{signal.strsignal(number)}{hint}"
    _say(f"{name} (process {process.pid}) was killed by signal {number} ({what}).")
    return 128 + number


def _asks_for_cpu(args: argparse.Namespace) -> bool:
    opts = getattr(args, "opts", None) or []
    given = dict(zip(opts[::2], opts[1::2])).get("MODEL.DEVICE", "auto")
    return given == "cpu" or (given == "auto" and getattr(args, "num_gpus", None) == 0)


def _say(text: str) -> None:
    """On stderr, in one piece, after what this process has printed before."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _leave_now(code: int) -> NoReturn:
    """Exit without waiting for anything: threads in a collective, gloo's, or loader workers."""
    # A thread that is stuck in a log handler would keep the handler's lock.
    tidy = threading.Thread(target=_tidy, daemon=True)
    tidy.start()
    tidy.join(GRACE)
    os._exit(code)


def _tidy() -> None:
    release_locks()
    logging.shutdown()
