import pytest

from virtex_d2.engine import preflight
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.preflight import (
    check_interfaces,
    check_records,
    clock_skew,
    code,
    code_version,
    versions,
)


def record(rank, **changes):
    return {
        "host": f"node{rank // 2}",
        "node": rank // 2,
        "local_rank": rank % 2,
        "world_size": 4,
        "pid": 100 + rank,
        "gpu": f"{rank % 2} (A100)",
        "_gpu_id": f"GPU-{rank}",
        "_versions": {"python": "3.11.7", "torch": "2.4.1"},
        "_code": {"virtex_d2/detection/trainer.py": "aa", "virtex_d2/detection/config.py": "bb"},
        **changes,
    }


def test_processes_that_fit_are_let_through():
    check_records({rank: record(rank) for rank in range(4)})


def test_so_are_those_that_have_come_until_now():
    check_records({2: record(2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 8}, "rank 3 on node1 was started as one of 8 processes, rank 0 on node0"),
        ({"local_rank": 0}, "rank 2 on node1 and rank 3 on node1 are the same local rank of one"),
        ({"_gpu_id": "GPU-2"}, "rank 2 on node1 and rank 3 on node1 use the same GPU of one"),
        ({"gpu": None, "_gpu_id": None}, "rank 3 on node1 has no GPU to use, rank 0 on node0 has"),
        (
            {"_versions": {"python": "3.11.7", "torch": "2.5.0"}},
            "rank 3 on node1 has other versions than rank 0 on node0: torch 2.5.0 instead of 2.4.1",
        ),
        ({"_versions": {"torch": "2.4.1"}}, "python absent instead of 3.11.7"),
        (
            {
                "_code": {
                    "virtex_d2/detection/trainer.py": "xx",
                    "virtex_d2/detection/config.py": "bb",
                }
            },
            "rank 3 on node1 runs other code than rank 0 on node0: "
            "virtex_d2/detection/trainer.py differ",
        ),
        ({"_code": {}}, "virtex_d2/detection/config.py, virtex_d2/detection/trainer.py differ"),
    ],
)
def test_the_one_that_does_not_fit_is_named(changes, message):
    records = {rank: record(rank) for rank in range(4)}
    records[3] = record(3, **changes)
    with pytest.raises(InputError, match=message):
        check_records(records)


def test_gpus_that_do_not_say_who_they_are_pass():
    check_records({rank: record(rank, _gpu_id=None) for rank in range(4)})


def test_versions_are_of_what_computes():
    assert {"python", "torch", "torchvision", "detectron2", "numpy"} <= versions().keys()
    assert "unknown" not in versions().values()


def test_the_code_is_every_file_of_the_package():
    assert {"virtex_d2/engine/preflight.py", "virtex_d2/detection/trainer.py"} <= code().keys()
    assert len(code_version()) == 12


@pytest.mark.parametrize(("ahead", "warns"), [(0.5, False), (7.0, True)])
def test_clocks_are_compared_by_their_medians(monkeypatch, ahead, warns):
    # The second was late to look once, which is no skew.
    every = [[0, 1, 2, 3, 4], [t + ahead + (90 if t == 2 else 0) for t in range(5)]]
    monkeypatch.setattr(preflight.dist, "barrier", lambda group: None)
    monkeypatch.setattr(preflight.comm, "all_gather", lambda times, group: every)
    skew, warning = clock_skew(None, ["rank 0 on a", "rank 1 on b"])
    assert skew == pytest.approx(ahead)
    assert bool(warning) == warns
    if warns:
        assert "the clock of rank 1 on b is 7.0 s ahead of that of rank 0 on a" in warning


def test_clocks_that_are_minutes_apart_are_an_error(monkeypatch):
    every = [[400.0] * 5, [0.0] * 5]
    monkeypatch.setattr(preflight.dist, "barrier", lambda group: None)
    monkeypatch.setattr(preflight.comm, "all_gather", lambda times, group: every)
    with pytest.raises(InputError, match="rank 0 on a is 400.0 s ahead of that of rank 1 on b"):
        clock_skew(None, ["rank 0 on a", "rank 1 on b"])


@pytest.fixture
def interfaces(monkeypatch):
    there = [(1, "lo"), (2, "eth0"), (3, "ib0")]
    monkeypatch.setattr(preflight.socket, "if_nameindex", lambda: there)


@pytest.mark.parametrize(
    ("variable", "value", "absent"),
    [
        ("GLOO_SOCKET_IFNAME", "^docker0", "\\^docker0"),
        ("GLOO_SOCKET_IFNAME", "^docker0,lo", "\\^docker0"),
        ("GLOO_SOCKET_IFNAME", "ib1", "ib1"),
        ("GLOO_SOCKET_IFNAME", "eth", "eth"),
        ("GLOO_SOCKET_IFNAME", "eth0,enp1s0", "enp1s0"),
        ("NCCL_SOCKET_IFNAME", "mlx", "mlx"),
        ("NCCL_SOCKET_IFNAME", "=eth", "eth"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", "eth, ib, lo"),
    ],
)
def test_an_interface_that_is_not_there_is_named_with_those_that_are(
    interfaces, variable, value, absent
):
    with pytest.raises(InputError, match=f"no interface {absent}, but lo, eth0, ib0") as caught:
        check_interfaces({variable: value}, on_gpu=True)
    assert str(caught.value).startswith(f"{variable}={value}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GLOO_SOCKET_IFNAME", "lo"),
        ("GLOO_SOCKET_IFNAME", "ib0,eth0"),
        ("GLOO_SOCKET_IFNAME", ""),
        ("NCCL_SOCKET_IFNAME", "^docker0,lo"),
        ("NCCL_SOCKET_IFNAME", "^=docker0"),
        ("NCCL_SOCKET_IFNAME", "ib"),
        ("NCCL_SOCKET_IFNAME", "=eth0"),
    ],
)
def test_interfaces_that_are_there_are_let_through(interfaces, variable, value):
    check_interfaces({variable: value}, on_gpu=True)


def test_nccls_variable_does_not_matter_on_cpus(interfaces):
    check_interfaces({"NCCL_SOCKET_IFNAME": "mlx"}, on_gpu=False)
