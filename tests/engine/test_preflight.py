import pytest

from virtex_d2.engine import preflight
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.preflight import (
    check_interfaces,
    check_records,
    code,
    code_version,
    versions,
)


def record(rank, **changes):
    same = {"device": "GPU", "torch": "2.4.1", "virtex_d2/x.py": "aa", "virtex_d2/y.py": "bb"}
    return {
        "name": f"rank {rank} on node{rank // 2}",
        "host": f"node{rank // 2}",
        "node": rank // 2,
        "local_rank": rank % 2,
        "gpu_id": f"GPU-{rank}",
        **changes,
        "same": {**same, **changes.get("same", {})},
    }


def test_processes_that_fit_are_let_through():
    check_records([record(rank) for rank in range(4)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_rank": 0}, "rank 2 on node1 and rank 3 on node1 are the same local rank of one"),
        ({"gpu_id": "GPU-2"}, "rank 2 on node1 and rank 3 on node1 use the same GPU of one"),
        (
            {"gpu_id": "", "same": {"device": "CPU"}},
            "rank 3 on node1 differs from rank 0 on node0: device CPU instead of GPU.*nvidia-smi",
        ),
        ({"same": {"torch": "2.5.0"}}, "rank 0 on node0: torch 2.5.0 instead of 2.4.1"),
        ({"same": {"nccl": "2"}}, "nccl 2 instead of absent"),
        (
            {"same": {"virtex_d2/x.py": "xx", "virtex_d2/y.py": "yy"}},
            "virtex_d2/x.py xx instead of aa, virtex_d2/y.py yy instead of bb",
        ),
    ],
)
def test_the_one_that_does_not_fit_is_named(changes, message):
    records = [*(record(rank) for rank in range(3)), record(3, **changes)]
    with pytest.raises(InputError, match=message):
        check_records(records)


def test_gpus_that_do_not_say_who_they_are_pass():
    check_records([record(rank, gpu_id="") for rank in range(4)])


def test_versions_are_of_what_computes():
    assert {"python", "torch", "torchvision", "detectron2", "numpy"} <= versions().keys()
    assert "unknown" not in versions().values()


def test_the_code_is_every_file_of_the_package():
    assert {"virtex_d2/engine/preflight.py", "virtex_d2/detection/trainer.py"} <= code().keys()
    assert len(code_version()) == 12


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
