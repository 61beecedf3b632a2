"""Real processes, on a CPU over gloo."""

import json
import os
import signal
import socket
import threading
import time

import pytest
import torch

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.distributed import launch, wrap_ddp
from virtex_d2.engine.errors import InputError


def results(folder, size):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def assert_codes(processes, code):
    assert {process.code for process in processes} == {code}, [p.err[-2000:] for p in processes]


@pytest.mark.parametrize("local_ranks", [(0, 1), (0, 0, 1)], ids=["one machine", "two machines"])
def test_processes_of_a_torchrun_environment_train_together(
    run_ranks, torchrun, tmp_path, local_ranks
):
    assert_codes(run_ranks("train", torchrun(*local_ranks)), 0)
    size = len(local_ranks)
    found = results(tmp_path, size)
    for rank, result in enumerate(found):
        assert (result["rank"], result["world_size"]) == (rank, size)
        assert result["wrapped"] == "DistributedDataParallel"
        assert result["gathered"] == list(range(size))
        # The model starts as the first process's, and its gradient is everybody's.
        assert result["weight"] == found[0]["weight"]
        assert result["gradient"] == found[0]["gradient"]
        assert result["seed"] == found[0]["seed"] >= 0
    # Norm statistics and random numbers are each process's own.
    assert len({str(result["running_mean"]) for result in found}) == size
    assert len({result["random"] for result in found}) == size
    machines = {(0, 1): [2, 2], (0, 0, 1): [1, 2, 2]}
    assert [result["local_rank"] for result in found] == list(local_ranks)
    assert [result["local_size"] for result in found] == machines[local_ranks]
    assert {"config.yaml", "log.txt"} <= set(os.listdir(tmp_path / "run"))
    assert "run.lock" not in os.listdir(tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    told = "2 on 1 machine " if size == 2 else "3 on 2 machines "
    assert log.count(f"Processes: {told}") == 1
    assert "Preflight: all-reduce right" in log
    assert "Processes" not in (tmp_path / "run" / "log.txt.rank1").read_text()


def test_tasks_of_srun_are_the_processes_in_any_distribution(run_ranks, srun, tmp_path):
    assert_codes(run_ranks("tell", srun(0, 1, 0)), 0)
    found = results(tmp_path, 3)
    places = [(result["local_rank"], result["local_size"]) for result in found]
    assert places == [(0, 2), (0, 1), (1, 2)]
    told = "\n".join(found[0]["description"])
    assert (
        "3 on 2 machines (srun, one task per process), over gloo, meeting at localhost:136" in told
    )
    assert "rank 1 on node1: the CPU" in told
    assert "rank 2 on node0: the CPU" in told


def test_the_flags_of_detectron2_start_machines(run_ranks, tmp_path, free_port):
    flags = ("--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port}")
    ranks = [["--machine-rank", 0], ["--machine-rank", 1]]
    assert_codes(run_ranks("tell", [{}, {}], *flags, extra=ranks), 0)
    assert [result["local_size"] for result in results(tmp_path, 2)] == [1, 1]


@pytest.mark.slow
class TestStarted:
    """Processes that are started here."""

    def test_tasks_of_nodes_start_theirs_and_share_the_cores(self, run_ranks, srun, tmp_path):
        cores = len(os.sched_getaffinity(0))
        assert_codes(run_ranks("tell", srun(0, 1), "--num-processes", 2), 0)
        found = results(tmp_path, 4)
        places = [(result["local_rank"], result["local_size"]) for result in found]
        assert places == [(0, 2), (1, 2)] * 2
        expected = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // 2)))
        assert {result["threads"] for result in found} == {expected}
        assert "4 on 2 machines (srun, one task per node)" in found[0]["description"][0]

    def test_a_signal_reaches_all_and_their_exit_code_comes_back(self, run_ranks, tmp_path):
        ended = []
        thread = threading.Thread(
            target=lambda: ended.extend(
                run_ranks("await_signal", [{}], "--num-processes", 2, timeout=400)
            )
        )
        thread.start()
        deadline = time.monotonic() + 240
        while not all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(results(tmp_path, 1)[0]["parent"], signal.SIGUSR1)
        thread.join(timeout=120)
        assert [process.code for process in ended] == [75], ended

    def test_one_that_was_killed_is_named(self, run_ranks):
        (process,) = run_ranks("vanish", [{}], "--num-processes", 2)
        assert process.code == 128 + signal.SIGKILL
        assert "was killed by signal 9 (Killed; out of memory? see `dmesg`)." in process.err

    def test_bad_input_of_one_is_told_once_and_is_the_exit_code(self, run_ranks):
        (process,) = run_ranks("refuse", [{}], "--num-processes", 2)
        assert process.code == 2
        assert process.err.count("images/7.jpg: truncated.") == 2  # and by the first rank's log
        assert "Traceback" not in process.err


class TestEndings:
    """No launcher is there to end the others: what broken connections and the timeout do alone."""

    def test_an_error_ends_all_and_its_traceback_comes_first(self, run_ranks, torchrun):
        processes = run_ranks("crash", torchrun(0, 1, 2))
        assert_codes(processes, 1)
        lines = processes[1].err.splitlines()
        assert lines[0].startswith("rank 1 on ")
        assert lines[0].endswith(" failed:")
        assert lines[1].startswith("Traceback")
        assert lines[-1] == "ZeroDivisionError: the second one's own mistake"
        # The first one says whose it was; the others of the machine need not.
        assert "The run ends: rank 1 on " in processes[0].err
        assert "ZeroDivisionError" in processes[0].err
        assert "Error" not in processes[2].err

    def test_an_input_error_is_a_line_and_code_2_of_all(self, run_ranks, torchrun):
        processes = run_ranks("refuse", torchrun(0, 1))
        assert_codes(processes, 2)
        assert processes[1].err.splitlines()[-1].endswith(": images/7.jpg: truncated.")
        assert processes[1].err.splitlines()[-1].startswith("error: rank 1 on ")
        assert not any("Traceback" in process.err for process in processes)

    def test_every_process_refuses_the_folder_of_another_run(self, run_ranks, torchrun, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text("")
        processes = run_ranks("set_up", torchrun(0, 1), "OUTPUT_DIR", "run")
        assert_codes(processes, 2)
        assert sum("holds another run (metrics.json)" in process.err for process in processes) >= 1
        assert os.listdir(tmp_path / "run") == ["metrics.json"]

    @pytest.mark.parametrize("victim", [0, 1])
    def test_who_waits_for_a_killed_process_fails_and_says_where(self, run_ranks, torchrun, victim):
        processes = run_ranks("vanish", torchrun(0, 1, VICTIM=victim))
        assert processes[victim].code == -signal.SIGKILL
        assert processes[1 - victim].code == 1
        assert f"rank {1 - victim} on " in processes[1 - victim].err
        told = ("rank 0, or what had started it, is gone", "comm.synchronize()")[victim]
        assert told in processes[1 - victim].err

    def test_at_the_collective_timeout_the_machines_processes_write_their_stacks(
        self, run_ranks, torchrun
    ):
        first, second = run_ranks("dawdle", torchrun(0, 1), "--collective-timeout", 2)
        assert (first.code, second.code) == (1, 1)
        assert "rank 0 on " in first.err
        assert "oversleep" in second.err, "where it is"

    def test_a_run_that_stops_on_purpose_ends_in_order(self, run_ranks, torchrun, tmp_path):
        assert_codes(run_ranks("stop_unfinished", torchrun(0, 1)), 75)
        assert len(results(tmp_path, 2)) == 2

    def test_one_may_have_much_to_do_alone_at_the_end(self, run_ranks, torchrun, tmp_path):
        processes = run_ranks("finish_apart", torchrun(0, 1), "--collective-timeout", 1)
        assert_codes(processes, 0)
        assert results(tmp_path, 1)


class TestMeeting:
    def test_who_has_not_come_is_named(self, run_ranks, srun):
        processes = run_ranks("tell", srun(0, 0, 1, 1)[:2], "--launch-timeout", 2)
        assert_codes(processes, 2)
        told = "ranks 2, 3 of 4 have not come within 2 s (--launch-timeout)"
        assert sum(told in process.err for process in processes) >= 1

    @pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
    def test_a_first_process_that_is_not_there_is_named(
        self, run_ranks, torchrun, free_port, address
    ):
        environments = torchrun(0, 1, MASTER_ADDR=address)[1:]
        (process,) = run_ranks("tell", environments, "--launch-timeout", 1)
        assert process.code == 2
        assert f"does not reach the meeting place at {address}:{free_port} (" in process.err

    def test_a_port_in_use_is_named(self, run_ranks, torchrun):
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            port = taken.getsockname()[1]
            (process,) = run_ranks("tell", torchrun(0, 1, MASTER_PORT=port)[:1])
        assert process.code == 2
        assert f"port {port} of " in process.err
        assert "is in use by another program" in process.err

    def test_other_sizes_are_named(self, run_ranks, torchrun):
        environments = torchrun(0, 1)
        environments[1]["WORLD_SIZE"] = 4
        processes = run_ranks("tell", environments, "--collective-timeout", 5)
        assert processes[1].code == 2
        assert "was started as one of 4 processes, rank 0 as one of 2" in processes[1].err

    @pytest.mark.parametrize(
        ("replaced", "by", "message"),
        [
            ("versions", "other_versions", "torchvision 0.1.0 instead of "),
            ("code", "other_code", "virtex_d2/detection/trainer.py 0123456789ab instead of "),
        ],
    )
    def test_another_environment_is_named(self, run_ranks, torchrun, replaced, by, message):
        processes = run_ranks(
            "tell",
            torchrun(0, 1),
            replace=[{}, {f"virtex_d2.engine.preflight.{replaced}": by}],
        )
        assert_codes(processes, 2)
        errors = "".join(process.err for process in processes)
        assert message in errors
        assert "rank 1 on " in errors

    def test_another_config_is_named(self, run_ranks, torchrun):
        overrides = [["SOLVER.BASE_LR", "0.1"], ["SOLVER.BASE_LR", "0.2"]]
        processes = run_ranks("set_up", torchrun(0, 1), extra=overrides)
        assert_codes(processes, 2)
        errors = "".join(process.err for process in processes)
        assert "rank 1 has another one than rank 0: SOLVER.BASE_LR is 0.2, not 0.1" in errors

    def test_a_folder_that_is_not_shared_is_named(self, run_ranks, torchrun, tmp_path):
        folders = [tmp_path / "one", tmp_path / "other"]
        for folder in folders:
            (folder / "run").mkdir(parents=True)
        processes = run_ranks("set_up", torchrun(0, 1), "OUTPUT_DIR", "run", folders=folders)
        assert_codes(processes, 2)
        errors = "".join(process.err for process in processes)
        assert "OUTPUT_DIR run: rank 1 on " in errors
        assert "does not hold what rank 0 has written there" in errors
        assert os.listdir(folders[0] / "run") == []


@pytest.fixture
def args():
    return argument_parser().parse_args([])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for key in os.environ:
        if key.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM")):
            monkeypatch.delenv(key)


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


def test_a_wrong_environment_is_found_before_anything_starts(args, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="expected a number in WORLD_SIZE, found 'two'"):
        launch(pytest.fail, args)


@pytest.mark.parametrize(("place", "device_ids"), [("cuda:0", [0]), ("cuda:3", [3]), ("cpu", None)])
def test_a_model_is_wrapped_on_its_own_device_whatever_its_local_rank(
    monkeypatch, place, device_ids
):
    """A task that sees one GPU alone has it as the first: local rank 1 has no cuda:1."""
    from detectron2.engine import defaults

    given = {}
    monkeypatch.setattr(defaults.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(defaults.comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(
        defaults, "DistributedDataParallel", lambda model, **options: given.update(options)
    )
    model = torch.nn.Linear(1, 1)
    parameter = type("P", (), {"device": torch.device(place)})
    monkeypatch.setattr(model, "parameters", lambda: iter([parameter]))
    wrap_ddp(model)
    assert given["device_ids"] == device_ids


def test_one_gpu_for_several_processes_is_refused(monkeypatch, args, tmp_path):
    from virtex_d2.engine import run as setup

    monkeypatch.setattr(setup.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(setup.dist, "get_backend", lambda: "nccl")
    for device in ("cuda:0", "cuda:1"):
        with pytest.raises(InputError, match=f"MODEL.DEVICE {device}: all 2 processes would"):
            setup._check_backend(device)
    setup._check_backend("cuda")
