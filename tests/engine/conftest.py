"""Runs of several processes, started quickly."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a launcher may have set for the tests themselves.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "GROUP_", "TORCHELASTIC_", "SLURM")


@dataclass(frozen=True)
class Ended:
    """One process of a run: its exit code and what it has printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def rank_server() -> Iterator[Callable[[dict], list[int]]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    environment.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("rank_server.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lock = threading.Lock()

    def ask(request: dict) -> list[int]:
        with lock:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture
def run_ranks(rank_server, tmp_path) -> Callable[..., list[Ended]]:
    """`run_ranks(main, environments, *arguments)` -> how each process ended.

    `main` is a function of `rank_programs`. Keyword arguments: `extra` (more arguments of each),
    `folders` (of each; all run in tmp_path otherwise), `replace` (of each: what of the project is
    replaced by what of `rank_programs`), `timeout` (seconds).
    """

    def run(
        main: str,
        environments: list[dict],
        *arguments: object,
        extra: list[list] | None = None,
        folders: list[Path] | None = None,
        replace: list[dict] | None = None,
        timeout: float = 120,
    ) -> list[Ended]:
        processes = [
            {
                "env": {key: str(value) for key, value in environment.items()},
                "arguments": [*map(str, extra[i] if extra else ()), *map(str, arguments)],
                "folder": str(folders[i] if folders else tmp_path),
                "output": str(tmp_path / f"process{i}"),
                "replace": replace[i] if replace else {},
            }
            for i, environment in enumerate(environments)
        ]
        codes = rank_server(
            {
                "main": main,
                "timeout": timeout,
                "processes": processes,
            }
        )
        return [
            Ended(
                code,
                (tmp_path / f"process{i}.out").read_text(),
                (tmp_path / f"process{i}.err").read_text(),
            )
            for i, code in enumerate(codes)
        ]

    return run


@pytest.fixture
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def torchrun(free_port) -> Callable[..., list[dict]]:
    """`torchrun(local_ranks)` -> the variables that it sets for each of so many processes."""

    def environments(*local_ranks: int, **more: object) -> list[dict]:
        return [
            {
                "RANK": rank,
                "WORLD_SIZE": len(local_ranks),
                "LOCAL_RANK": local_rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port,
                **more,
            }
            for rank, local_rank in enumerate(local_ranks)
        ]

    return environments


@pytest.fixture
def srun() -> Callable[..., list[dict]]:
    """`srun(nodes_of_tasks)` -> the variables of the tasks of a step, all on this machine.

    `nodes_of_tasks`: the number of each task's node; 0, 1, 0, 1 is a cyclic distribution.
    """

    def environments(*nodes_of_tasks: int, **more: object) -> list[dict]:
        nodes = max(nodes_of_tasks) + 1
        return [
            {
                "SLURM_JOB_ID": 77,
                "SLURM_STEP_ID": 0,
                "SLURM_NTASKS": len(nodes_of_tasks),
                "SLURM_STEP_NUM_TASKS": len(nodes_of_tasks),
                "SLURM_PROCID": task,
                "SLURM_LOCALID": nodes_of_tasks[:task].count(node),
                "SLURM_NODEID": node,
                "SLURM_STEP_NUM_NODES": nodes,
                "SLURM_STEP_NODELIST": "localhost",
                "SLURMD_NODENAME": f"node{node}",
                **more,
            }
            for task, node in enumerate(nodes_of_tasks)
        ]

    return environments
