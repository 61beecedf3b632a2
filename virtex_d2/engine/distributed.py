"""Start a run's processes, however that was asked for, and end them together."""

import argparse
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from virtex_d2.engine import signals
from virtex_d2.engine.cli import COLLECTIVE_TIMEOUT, LAUNCH_TIMEOUT
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.failures import Board, Failure, FailureWatch, leave, leave_now, say
from virtex_d2.engine.local_processes import limit_threads, run_processes
from virtex_d2.engine.lock import release_locks
from virtex_d2.engine.preemption import EXIT_UNFINISHED
from virtex_d2.engine.preflight import (
    check_collectives,
    check_interfaces,
    check_records,
    clock_skew,
    code_version,
    identity,
    versions,
)
from virtex_d2.engine.rendezvous import Records, connect, meet, numbers, open_store
from virtex_d2.engine.topology import Machine, Topology, resolve

Main = Callable[[argparse.Namespace], Any]

_description = ["Processes: one."]


def launch(main: Main, args: argparse.Namespace) -> None:
    """Call `main(args)` in every process of the run, with detectron2's `comm` ready.

    `runtime.topology.resolve` says which processes: of torchrun, of srun with a task per process or
    per node, of detectron2's flags, or this one alone. They meet, check that they fit together
    (`runtime.preflight`), and communicate over NCCL where there are GPUs, else over gloo.

    An exception in one process ends all of them within seconds with one exit code, and is the first
    that is printed. A SystemExit with code 0 or 75 (stopped on purpose, to go on later) is an end
    like that of `main`: all processes have to come to it.

    Args:
        main: a function of a module, as processes that are started here import it.
        args: of `runtime.arguments.argument_parser`.

    Raises:
        SystemExit: in a run of several processes, where it does not end well.
    """
    gpus = 0 if _asks_for_cpu(args) or not torch.cuda.is_available() else torch.cuda.device_count()
    machine = Machine(socket.gethostname(), gpus, pid=os.getpid())
    topology = resolve(args, os.environ, machine)
    try:
        if topology.spawn:
            _account_for_machine(main, args, topology)
        elif topology.world_size > 1:
            server, port = open_store(topology, _patience(args))
            _take_part(main, args, topology, port)
            del server  # was open until all had left
        else:
            _description[:] = ["Processes: one.", *([topology.note] if topology.note else [])]
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


def _take_part(
    main: Main, args: argparse.Namespace, topology: Topology, port: int, parent: int | None = None
) -> None:
    """Be one of the run's processes, from meeting the others to leaving them."""
    patience, rank = _patience(args), topology.rank
    if topology.gpu is not None:
        torch.cuda.set_device(topology.gpu)  # before anything makes a context on the first one
    store = connect(topology, port, patience)
    watch = FailureWatch(
        # Of its own: what waits in one connection holds up all that use it.
        connect(topology, port, patience),
        *(rank, topology.world_size, topology.host),
        speaks=topology.local_rank == 0,
        serves=topology.serves,
        parent=parent,
    )
    watch.start()
    stopped: SystemExit | None = None
    try:
        others = meet(
            store,
            *("rank", rank, topology.world_size),
            identity(topology),
            check_records,
            patience,
            interrupted=lambda: None,  # the watch ends this process
            expected=topology.expected,
            notice=say,
        )
        watch.know([other["host"] for other in others])
        with watch.deadline(patience, "their first collectives"):
            _join(store, topology, others, _collective_timeout(args))
            _look_over(topology, others)
        main(args)
    except SystemExit as error:
        if error.code not in (None, 0, EXIT_UNFINISHED):
            watch.fail(error)
        stopped = error
    except BaseException as error:
        watch.fail(error)
    watch.finish()
    release_locks()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()
    watch.leave()
    if stopped is not None:
        raise stopped


def _join(store: dist.Store, topology: Topology, others: list[dict], timeout: timedelta) -> None:
    """Make the process groups: all, over gloo too, and this machine's for detectron2's `comm`."""
    on_gpu = topology.gpu is not None
    check_interfaces(os.environ, on_gpu)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timeout,
    )
    if on_gpu:
        gloo = dist.new_group(backend="gloo", timeout=timeout)
        # detectron2 would make it when it first needs it, with torch's own timeout.
        comm._get_global_gloo_group = lambda: gloo
    for node in sorted({other["node"] for other in others}):  # every rank makes all, in one order
        ranks = [rank for rank, other in enumerate(others) if other["node"] == node]
        group = dist.new_group(ranks, timeout=timeout)
        if topology.rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _look_over(topology: Topology, others: list[dict]) -> None:
    """Check communication and clocks, and put into words what kind of run this is."""
    names = [f"rank {rank} on {other['host']}" for rank, other in enumerate(others)]
    group = comm._get_global_gloo_group()
    seconds = check_collectives(topology, group)
    skew, warning = clock_skew(group, names)
    nodes: dict[int, list[int]] = {}
    for rank, other in enumerate(others):
        nodes.setdefault(other["node"], []).append(rank)
    place = f"{topology.address}:{topology.port}" if topology.port else "a port of this machine"
    lines = [
        f"Processes: {len(others)} on {len(nodes)} machine{'s' if len(nodes) > 1 else ''} "
        f"({topology.launcher}), over {'NCCL' if topology.gpu is not None else 'gloo'}, meeting at "
        f"{place}.",
        *([topology.note] if topology.note else []),
    ]
    for ranks in nodes.values():
        members = [others[rank] for rank in ranks]
        gpus = [member["gpu"] for member in members]
        on = "the CPU" if gpus[0] is None else f"GPU {', '.join(gpus)}"
        what = "ranks" if len(ranks) > 1 else "rank"
        lines.append(f"  {members[0]['host']}: {what} {numbers(ranks)} on {on}")
    if len({len(ranks) for ranks in nodes.values()}) > 1:
        lines.append("Machines have different numbers of processes.")
    lines.append(
        f"Preflight: all-reduce right, in {1000 * seconds:.1f} ms; clocks within {skew:.2f} s; "
        f"code {code_version()} and "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())} everywhere."
    )
    _description[:] = [*lines, *([f"Warning: {warning}"] if warning else [])]


def _account_for_machine(main: Main, args: argparse.Namespace, topology: Topology) -> None:
    """Agree with the other machines on ranks, then start this one's processes and wait for them."""
    patience = _patience(args)
    server, port = open_store(topology, patience)
    store = connect(topology, port, patience)
    board = Board(store)
    who = f"machine {topology.node} ({topology.host})"

    def end_with_the_others() -> None:
        failure = board.read()
        if failure is not None:
            say(f"{who} ends, because {failure.summary}")
            raise SystemExit(failure.code)

    machines = [(topology.host, topology.spawn)]
    if topology.nodes > 1:
        try:
            records = meet(
                store,
                *("machine", topology.node, topology.nodes),
                _machine(topology),
                _check_machines,
                patience,
                interrupted=end_with_the_others,
                expected=[(host, 1) for host, _ in topology.expected],
                notice=say,
            )
        except Exception as error:
            failure = Failure.of(error, who)
            if board.claim():
                say(failure.text)
                board.publish(failure)
            leave(store, "machines left", topology.nodes if topology.serves else 0)
            raise SystemExit(failure.code) from None
        machines = [(record["host"], record["processes"]) for record in records]
    places = [topology.process(machines, local_rank) for local_rank in range(topology.spawn)]
    if topology.spawn == 1:  # it needs not be started
        try:
            _take_part(main, args, replace(places[0], serves=topology.serves), port)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    else:
        if topology.gpu is None:
            limit_threads(topology.spawn)
        code = run_processes(
            _in_new_process,
            [(main, args, place, port, os.getpid()) for place in places],
            [place.rank for place in places],
            topology.host,
            board,
        )
    leave(store, "machines left", topology.nodes if topology.serves else 0)
    del server
    if code:
        raise SystemExit(code)


def _in_new_process(
    main: Main, args: argparse.Namespace, topology: Topology, port: int, parent: int
) -> None:
    signals.release()
    try:
        _take_part(main, args, topology, port, parent)
    except Exception as error:  # it did not get so far that the others could be told
        failure = Failure.of(error, f"rank {topology.rank} on {topology.host}")
        say(failure.text)
        leave_now(failure.code)


def _machine(topology: Topology) -> dict[str, Any]:
    return {
        "host": topology.host,
        "pid": os.getpid(),
        "processes": topology.spawn,
        "machines": topology.nodes,
        "gpu": topology.gpu is not None,
    }


def _check_machines(records: Records) -> None:
    """Machines may have different numbers of GPUs, but not none."""
    reference = records[min(records)]
    for node, record in records.items():
        if record["machines"] != reference["machines"]:
            raise InputError(
                f"machine {node} ({record['host']}) was started as one of {record['machines']}, "
                f"machine {min(records)} ({reference['host']}) as one of {reference['machines']}. "
                "Give all the same --num-machines."
            )
        if record["gpu"] != reference["gpu"]:
            without, other = (record, reference) if reference["gpu"] else (reference, record)
            raise InputError(
                f"{without['host']} has no GPU to use, {other['host']} has. Check nvidia-smi "
                "there, or use MODEL.DEVICE cpu."
            )


def _patience(args: argparse.Namespace) -> float:
    return getattr(args, "launch_timeout", LAUNCH_TIMEOUT)


def _collective_timeout(args: argparse.Namespace) -> timedelta:
    return timedelta(seconds=getattr(args, "collective_timeout", COLLECTIVE_TIMEOUT))


def _asks_for_cpu(args: argparse.Namespace) -> bool:
    opts = getattr(args, "opts", None) or []
    given = dict(zip(opts[::2], opts[1::2])).get("MODEL.DEVICE", "auto")
    return given == "cpu" or (given == "auto" and getattr(args, "num_gpus", None) == 0)
