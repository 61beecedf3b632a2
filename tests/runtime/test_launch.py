"""Real processes, on a CPU over gloo."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.launch import launch, wrap_ddp
from virtex_d2.runtime.setup import argument_parser

ROOT = Path(__file__).resolve().parents[2]

RANK_PROGRAM = """
    import json, os, sys
    import torch
    from detectron2.utils import comm
    from virtex_d2.runtime.errors import InputError, exit_on_input_error
    from virtex_d2.runtime.launch import launch, wrap_ddp
    from virtex_d2.runtime.setup import argument_parser, setup_run
    from detectron2.config import get_cfg

    def main(args):
        folder = sys.argv[1]
        torch.manual_seed(comm.get_rank())
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        ddp = wrap_ddp(model)
        batch = torch.full((4, 3), float(comm.get_rank())) + torch.arange(4.0)[:, None]
        ddp(batch).pow(2).sum().backward()
        cfg = get_cfg()
        cfg.OUTPUT_DIR, cfg.SEED, cfg.MODEL.DEVICE = os.path.join(folder, "run"), -1, "auto"
        setup_run(cfg, args)
        result = {
            "rank": comm.get_rank(),
            "world_size": comm.get_world_size(),
            "local_rank": comm.get_local_rank(),
            "local_size": comm.get_local_size(),
            "wrapped": type(ddp).__name__,
            "weight": model[0].weight.tolist(),
            "gradient": model[0].weight.grad.tolist(),
            "running_mean": model[1].running_mean.tolist(),
            "gathered": comm.all_gather(comm.get_rank()),
            "seed": cfg.SEED,
            "random": torch.rand(1).item(),
            "folder": sorted(os.listdir(cfg.OUTPUT_DIR)),
        }
        with open(os.path.join(folder, f"rank{comm.get_rank()}.json"), "w") as file:
            json.dump(result, file)
        comm.synchronize()

    with exit_on_input_error():
        launch(main, argument_parser().parse_args([]))
        assert not torch.distributed.is_initialized()
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_ranks(folder, local_ranks):
    """Start one process per entry of `local_ranks`, as torchrun would; wait; give their results."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(RANK_PROGRAM))
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(local_ranks)),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, program, folder],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, local_rank in enumerate(local_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


@pytest.mark.slow
@pytest.mark.parametrize("local_ranks", [(0, 1), (0, 0, 1)], ids=["one machine", "two machines"])
def test_processes_of_a_torchrun_environment_train_together(tmp_path, local_ranks):
    for code, _, stderr in run_ranks(tmp_path, local_ranks):
        assert code == 0, stderr
    size = len(local_ranks)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(size)]
    first = results[0]
    for rank, result in enumerate(results):
        assert (result["rank"], result["world_size"]) == (rank, size)
        assert result["wrapped"] == "DistributedDataParallel"
        assert result["gathered"] == list(range(size))
        # The model starts as the first process's, and its gradient is everybody's.
        assert result["weight"] == first["weight"]
        assert result["gradient"] == first["gradient"]
        assert result["seed"] == first["seed"] >= 0
    # Norm statistics and random numbers are each process's own.
    assert len({str(result["running_mean"]) for result in results}) == size
    assert len({result["random"] for result in results}) == size
    machines = {(0, 1): [2, 2], (0, 0, 1): [1, 2, 2]}
    assert [result["local_rank"] for result in results] == list(local_ranks)
    assert [result["local_size"] for result in results] == machines[local_ranks]
    assert {"config.yaml", "log.txt"} <= set(os.listdir(tmp_path / "run"))


@pytest.mark.slow
def test_every_process_refuses_the_folder_of_another_run(tmp_path):
    """Guards against one process failing while the others wait for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("")
    for code, _, stderr in run_ranks(tmp_path, (0, 1)):
        assert code == 2
        assert "holds another run (metrics.json)" in stderr.splitlines()[-1]


@pytest.fixture
def args():
    return argument_parser().parse_args([])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)


def test_a_single_process_calls_main_directly(args):
    calls = []
    launch(calls.append, args)
    assert calls == [args]
    assert not torch.distributed.is_initialized()


def test_one_process_under_torchrun_is_a_single_process(args, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    calls = []
    launch(calls.append, args)
    assert calls == [args]


def test_a_model_of_a_single_process_stays_as_it_is():
    model = torch.nn.Linear(1, 1)
    assert wrap_ddp(model) is model


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "expected a number in RANK, found ''.*SLURM_PROCID"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "expected a number in RANK, found 'one'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "expected a number in LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "expected a number in WORLD_SIZE, found 'two'"),
    ],
)
def test_an_incomplete_environment_is_named(args, monkeypatch, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        launch(pytest.fail, args)


def test_more_gpus_than_there_are_is_an_error_with_the_count():
    count = torch.cuda.device_count()
    args = argument_parser().parse_args(["--num-gpus", str(count + 2)])
    with pytest.raises(InputError, match=f"shows {count} CUDA.*torchrun"):
        launch(pytest.fail, args)


def test_several_machines_need_a_meeting_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = argument_parser().parse_args(["--num-machines", "2"])
    with pytest.raises(InputError, match="--dist-url auto works on one machine"):
        launch(pytest.fail, args)
