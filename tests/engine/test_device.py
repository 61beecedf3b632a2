"""GPUs that were asked for, and precision."""

import os
from pathlib import Path

import pytest
import torch

from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.engine import device
from virtex_d2.engine.device import check_amp, resolve_device
from virtex_d2.engine.errors import InputError

ASKING = {
    "SLURM_JOB_GPUS": ("0", "0,1"),
    "SLURM_STEP_GPUS": ("0", "2,3"),
    "SLURM_GPUS_ON_NODE": ("1", "8"),
    "CUDA_VISIBLE_DEVICES": ("0", "0,1", "GPU-8932f937", "MIG-a1b2"),
}
NOT_ASKING = {
    "SLURM_JOB_GPUS": "",
    "SLURM_GPUS_ON_NODE": "0",
    "CUDA_VISIBLE_DEVICES": "-1",
}


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ASKING:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in ASKING.items() for v in values]
)
def test_gpus_that_were_given_and_cannot_be_used_are_no_cpu(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}.*no CUDA device is usable here: "):
        resolve_device("auto")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(("name", "value"), NOT_ASKING.items())
def test_where_nobody_asked_auto_is_the_cpu(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert resolve_device("auto") == "cpu"


def test_what_was_asked_by_flag_or_key_is_not_replaced():
    with pytest.raises(InputError, match="^--num-gpus 1: no CUDA device"):
        resolve_device("auto", 1)
    with pytest.raises(InputError, match="^MODEL.DEVICE cuda:1: no CUDA device"):
        resolve_device("cuda:1")
    assert resolve_device("cpu", 1) == "cpu"


def test_no_gpus_means_none_where_there_are_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("auto", 1)) == ("cuda", "cuda")
    assert resolve_device("auto", 0) == "cpu"


def test_the_reason_is_the_build_the_variable_the_container_or_the_drivers_words(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert "is a build for CPUs" in device._why_not()
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device._why_not() == f"CUDA_VISIBLE_DEVICES='{hidden}' hides them"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/virtex.sif")
    assert "--nv" in device._why_not()
    monkeypatch.delenv("APPTAINER_CONTAINER")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert "its driver is not loaded" in device._why_not()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: ["/dev/nvidia0"])

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert device._why_not().startswith("The NVIDIA driver on your system is too old")


@pytest.mark.parametrize(("where", "capability"), [("cuda", (7, 0)), ("cuda:1", (7, 5))])
def test_no_run_emulates_bfloat16(monkeypatch, where, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cfg = get_virtex_cfg()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = where, True
    with pytest.raises(InputError, match="Tesla T4 has no such arithmetic. Use float16"):
        check_amp(cfg)
    cfg.SOLVER.AMP.DTYPE = "float16"
    check_amp(cfg)
    cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE = "bfloat16", "cpu"
    check_amp(cfg)


def test_a_caption_is_not_computed_on_the_cpu_of_a_gpu_job(monkeypatch):
    from pretrain.methods.captioning.captioner import load_captioner

    monkeypatch.setitem(os.environ, "SLURM_JOB_GPUS", "0")
    with pytest.raises(InputError, match="Slurm has given GPUs"):
        load_captioner("no such model")
