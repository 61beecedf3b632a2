"""Reasons to stop, and how processes agree on them."""

import socket
import textwrap
import time

import pytest

from tests.e2e.forked_runs import shared_server
from virtex_d2.engine import signals, stopping
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.stopping import StopRequested, Watch, seconds_of
from virtex_d2.engine.unfinished import exit_at_once_if_unfinished


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch):
    for key in ("SLURM_JOB_END_TIME", "SLURM_JOB_START_TIME", "VIRTEX_TIME_BUDGET"):
        monkeypatch.delenv(key, raising=False)
    yield
    stopping._watch = None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("23.5h", 84600), ("2d", 172800)]
    + [("01:00:30", 3630), ("1-02:00:00", 93600)],
)
def test_a_time_budget_has_a_unit_or_slurms_form(text, seconds):
    assert seconds_of(text, "--time-budget") == seconds


@pytest.mark.parametrize("text", ["60", "", "1h30", "10:00", "-5m", "soon"])
def test_a_time_budget_that_could_mean_two_things_is_refused(text):
    with pytest.raises(InputError, match=r"--time-budget .*45m, 23.5h"):
        seconds_of(text, "--time-budget")


def test_a_budget_is_over_so_long_after_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_started", time.monotonic() - 100)
    assert Watch(str(tmp_path), 99).reason() == "time budget"
    assert Watch(str(tmp_path), 160).reason() == ""


def test_the_environment_gives_a_budget_where_no_flag_does(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTEX_TIME_BUDGET", "0s")
    stopping.watch(str(tmp_path), "1h")
    stopping.check()
    stopping.watch(str(tmp_path))
    with pytest.raises(StopRequested, match="time budget"):
        stopping.check()
    monkeypatch.setenv("VIRTEX_TIME_BUDGET", "60")
    with pytest.raises(InputError, match="VIRTEX_TIME_BUDGET '60'"):
        stopping.watch(str(tmp_path))


@pytest.mark.parametrize(
    ("length", "left", "stops"),
    [(3600, 100, True), (3600, 140, False)]  # two minutes
    + [(60, 5, True), (60, 40, False)],  # a tenth, else a short job would never train
)
def test_a_slurm_job_is_left_before_it_ends(length, left, stops, tmp_path, monkeypatch):
    end = int(time.time()) + left
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(end - length))
    assert Watch(str(tmp_path), None).reason() == ("end of the Slurm job" if stops else "")
    assert Watch(str(tmp_path), 3600.0).reason() == ""  # the user's own budget counts instead


@pytest.mark.parametrize("ago", [1, 3600, 10**7])
@pytest.mark.parametrize("start", [True, False])
def test_the_end_of_a_job_that_is_over_is_no_limit(ago, start, tmp_path, monkeypatch, caplog):
    """A shell of tmux or Jupyter keeps the variables of the job that it was started in."""
    end = int(time.time()) - ago
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    if start:
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(end - 3600))
    caplog.set_level("INFO")
    assert Watch(str(tmp_path), None).reason() == ""
    assert [r.message for r in caplog.records if "It is no limit" in r.message]


def test_a_file_stop_asks_for_one_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "STOP_FILE_PERIOD", 0.0)
    stopping.watch(str(tmp_path))
    assert list(stopping.abandonable([1, 2])) == [1, 2]
    (tmp_path / "STOP").touch()
    with pytest.raises(StopRequested, match="the file STOP"):
        list(stopping.abandonable([1, 2]))
    stopping._watch.obeyed()
    assert not (tmp_path / "STOP").exists()
    stopping.watch(str(tmp_path))
    stopping.check()


def test_nothing_stops_what_nobody_watches(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_received", [15])
    stopping.check()
    assert list(stopping.checked("ab")) == ["a", "b"]
    stopping.watch(str(tmp_path))
    with pytest.raises(StopRequested, match="TERM"):
        stopping.check()


def test_a_finished_tool_and_one_that_failed_end_as_ever():
    with exit_at_once_if_unfinished():
        pass
    with pytest.raises(SystemExit, match="3"), exit_at_once_if_unfinished():
        raise SystemExit(3)


RANK = """
    import os, signal, sys, time
    import torch.distributed as dist
    import virtex_d2.engine.listening
    from detectron2.utils import comm
    from virtex_d2.engine import stopping

    dist.init_process_group("gloo")
    rank = comm.get_rank()
    sys.stdout = open(f"{sys.argv[1]}/told{rank}", "w")
    stopping.watch(sys.argv[1])

    def batches(lengths, kill):
        seen = 0
        try:
            for batch in stopping.abandonable(range(lengths[rank])):
                time.sleep(0.002 * (rank + 1))
                seen += 1
                if rank == kill and seen == 5:
                    os.kill(os.getpid(), signal.SIGUSR1)
        except stopping.StopRequested as stop:
            return f"stopped {stop.reason} {seen < lengths[rank]}"
        return f"all {seen}"

    print(batches((3, 40), None), flush=True)   # of unequal length
    print(batches((0, 7), None), flush=True)
    print(batches((4, 2000), 1), flush=True)    # one waits at its end, the other is stopped
    try:
        stopping.check()
    except stopping.StopRequested as stop:
        print("agreed", stop.reason, flush=True)
    comm.synchronize()
    os._exit(0)
"""


@pytest.mark.slow
def test_processes_with_unequal_batches_stop_together_whoever_is_asked(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = tmp_path / "rank.py"
    program.write_text(textwrap.dedent(RANK))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        shared_server().start(
            [str(program), str(tmp_path)], {**environment, "RANK": str(rank)}, tmp_path / f"{rank}"
        )
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    outputs = [(tmp_path / f"told{rank}").read_text().splitlines() for rank in range(2)]
    assert outputs[0] == ["all 3", "all 0", "stopped USR1 False", "agreed USR1"]
    assert outputs[1] == ["all 40", "all 7", "stopped USR1 True", "agreed USR1"]
