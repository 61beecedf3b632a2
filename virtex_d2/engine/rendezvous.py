"""Where the processes of a run meet before they can communicate: each says who it is."""

import json
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.topology import Topology

POLL = 0.1  # seconds
NAME_SERVICE_PATIENCE = 10  # seconds, for one that is overloaded when a large job starts
NOTICE_AFTER = 15  # seconds of waiting until the user is told for whom

Records = dict[int, dict[str, Any]]


def open_store(topology: Topology, patience: float) -> tuple[dist.TCPStore | None, int]:
    """Open the meeting place, where this process is to do it.

    Returns:
        What keeps it open (None: somebody else does), and its port.
    """
    if not topology.serves:
        return None, topology.port
    try:
        server = dist.TCPStore(
            "localhost",
            topology.port,
            None,
            True,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise InputError(
            f"port {topology.port} of {topology.host} is in use by another program, and the "
            "processes of this run were to meet there. Give a free one: --dist-url "
            f"tcp://{topology.address}:PORT, or under torchrun --master-port."
        ) from error
    return server, server.port


def connect(topology: Topology, port: int, patience: float) -> dist.Store:
    """A connection of its own to the meeting place, with keys that are this run's alone."""
    address = "localhost" if topology.serves else topology.address
    _require_known(address, port, topology.host)
    _await_listener(address, port, topology, patience)
    store = dist.TCPStore(
        address,
        port,
        None,
        False,
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"virtex/{topology.run_id}", store)


def meet(
    store: dist.Store,
    what: str,
    index: int,
    total: int,
    record: dict[str, Any],
    judge: Callable[[Records], None],
    patience: float,
    *,
    interrupted: Callable[[], None],
    expected: Sequence[tuple[str, int]] = (),
    notice: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Tell all others who this one is, and learn who they are.

    The first waits for all, naming those that are missing, and judges whether they fit together;
    the others wait for its word.

    Args:
        what: "rank" or "machine".
        index, total: of this one, and of all.
        record: what the others are to know, with "host" and what `judge` looks at; JSON. Entries
            whose names begin with "_" are for `judge` alone.
        judge: raises an InputError where the records so far do not fit together. It is called in
            the first one, each time that somebody has come.
        patience: seconds to wait.
        interrupted: raises where another one has failed meanwhile.
        expected: names of machines with how many of these each is to have.
        notice: told once of a long wait.

    Returns:
        The records of all.
    """
    _register(store, what, index, record)
    deadline = time.monotonic() + patience
    if index != 0:
        # The first gives up after `patience`, too, and says more about it.
        while not is_told(store, f"{what}s"):
            interrupted()
            if time.monotonic() > deadline + 30:
                raise InputError(
                    f"{what} 0 has said nothing for {patience:.0f} s, while {what} {index} on "
                    f"{record['host']} waited. Was it started?"
                )
            time.sleep(POLL)
        others = json.loads(store.get(f"{what}s"))
        if len(others) != total:
            raise InputError(
                f"{record['host']} was started as {what} {index} of {total}, but {what} 0 on "
                f"{others[0]['host']} as one of {len(others)}. Start all with the same sizes."
            )
        return others
    came: Records = {}
    notice_at = time.monotonic() + NOTICE_AFTER
    while len(came) < total:
        arrived = [
            other
            for other in range(total)
            if other not in came and is_told(store, f"{what}/{other}")
        ]
        for other in arrived:
            came[other] = json.loads(store.get(f"{what}/{other}"))
        if arrived:
            judge(came)
            continue
        interrupted()
        if time.monotonic() > deadline:
            raise InputError(
                f"{_missing(what, came, total, expected)} have not come within {patience:.0f} s "
                "(--launch-timeout). Were they started, and do they run yet? Can their machines "
                f"reach {record['host']}?"
            )
        if time.monotonic() > notice_at:
            notice(f"Waiting for {_missing(what, came, total, expected)} ...")
            notice_at = float("inf")
        time.sleep(POLL)
    others = [
        {key: value for key, value in came[i].items() if not key.startswith("_")}
        for i in range(total)
    ]
    tell(store, f"{what}s", json.dumps(others))
    return others


def tell(store: dist.Store, key: str, text: str) -> None:
    """Write something down for all to see."""
    store.set(key, text)
    store.add(f"{key} is told", 1)


def is_told(store: dist.Store, key: str) -> bool:
    """Whether `tell` has been called; torch 2.4's stores can only wait for a key."""
    return store.add(f"{key} is told", 0) > 0


def numbers(ranks: Sequence[int]) -> str:
    """Numbers in words: "0-3, 7"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _missing(what: str, came: Records, total: int, expected: Sequence[tuple[str, int]]) -> str:
    """Who is missing and where they should be, and who came from where."""
    absent = [index for index in range(total) if index not in came]
    by_host: dict[str, list[int]] = {}
    for index, record in came.items():
        by_host.setdefault(record["host"], []).append(index)
    short = [
        f"{host} ({len(by_host.get(host, []))} of {count} came)"
        for host, count in expected
        if len(by_host.get(host, [])) < count
    ]
    where = f", expected on {', '.join(short)}" if short else ""
    there = "; ".join(
        f"{what}{'s' if len(ranks) > 1 else ''} {numbers(ranks)} on {host}"
        for host, ranks in by_host.items()
    )
    return f"{what}s {numbers(absent)} of {total}{where} (so far came {there})"


def _register(store: dist.Store, what: str, index: int, record: dict[str, Any]) -> None:
    mine = json.dumps(record)
    first = store.compare_set(f"{what}/{index}", "", mine).decode()
    if first != mine:
        other = json.loads(first)
        raise InputError(
            f"{what} {index} is there twice: process {other['pid']} on {other['host']} and process "
            f"{record['pid']} on {record['host']}. Give each machine its own --machine-rank (RANK, "
            "where that is set by hand), and each run a meeting place of its own."
        )
    store.add(f"{what}/{index} is told", 1)


def _require_known(address: str, port: int, host: str) -> None:
    deadline = time.monotonic() + NAME_SERVICE_PATIENCE
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or time.monotonic() > deadline:
                raise InputError(
                    f"{host} does not know the host {address}, where the processes were to meet "
                    f"({error.strerror}). Check the name with `getent hosts {address}`, or give an "
                    f"address: --dist-url tcp://ADDRESS:{port}."
                ) from error
        time.sleep(0.5)


def _await_listener(address: str, port: int, topology: Topology, patience: float) -> None:
    """Until somebody listens there: torch's own client fills the log with its failed attempts."""
    deadline = time.monotonic() + patience
    while True:
        reason = _attempt(address, port)
        if not reason:
            return
        if time.monotonic() > deadline:
            first = "machine 0" if topology.spawn else "rank 0"
            raise InputError(
                f"{first} has not opened the meeting place at {address}:{port} within "
                f"{patience:.0f} s ({reason}; asked by {topology.host}). Is it running, is that "
                "the name of its machine, and does a firewall let the port through?"
            )
        time.sleep(POLL)


def _attempt(address: str, port: int) -> str:
    """Why nobody listens there; "" where somebody does."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return ""
    except OSError as error:
        return error.strerror or str(error) or "no answer"
