"""What a run computes on: the device, and the precision that it can do."""

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from yacs.config import CfgNode

from virtex_d2.engine.errors import InputError, nearest

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# By index, UUID or MIG slice; anything else in the first place hides all GPUs.
_NAMES_GPUS = re.compile(r"\s*(\d|GPU-|MIG-)")


def release_freed_memory() -> None:
    """Give memory that is freed back to the system: glibc keeps it for as long as a run lives.

    For what is done now and then and takes more than a step does: an evaluation, a checkpoint.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim:
        trim(0)


def resolve_device(device: str, num_gpus: int | None = None, name: str = "MODEL.DEVICE") -> str:
    """MODEL.DEVICE with "auto" resolved to "cuda" where there is a device, else to "cpu".

    Where GPUs were asked for, or a scheduler has given them, "auto" means CUDA.

    Args:
        name: what said `device`, for messages.
    """
    asked = f"{name} {device}"
    if device == "auto":
        if num_gpus == 0:
            return "cpu"
        device, asked = "cuda", _who_asks(os.environ, num_gpus)
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    if not asked:
        return "cpu"
    raise InputError(
        f"{asked}: no CUDA device is usable here: {_why_not()}. MODEL.DEVICE cpu (of "
        "tools without a config --device cpu) computes on the CPU all the same."
    )


def _who_asks(environment: Mapping[str, str], num_gpus: int | None) -> str:
    """What says that there are GPUs for this run; "" where nothing does."""
    if num_gpus:
        return f"--num-gpus {num_gpus}"
    # The first two are numbers of GPUs, from 0; the third says how many.
    for name, none in (("JOB_GPUS", ""), ("STEP_GPUS", ""), ("GPUS_ON_NODE", "0")):
        name = f"SLURM_{name}"
        if environment.get(name, "") not in ("", none):
            return f"Slurm has given GPUs ({name}={environment[name]})"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return f"CUDA_VISIBLE_DEVICES={visible}" if _NAMES_GPUS.match(visible) else ""


def _why_not() -> str:
    """Why torch finds no CUDA device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch, {torch.__version__}, is a build for CPUs; docs/install.md has others"
    if not _NAMES_GPUS.match(visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides them"
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        inside = {"APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"} & os.environ.keys()
        if inside or Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
            return "this container sees none: start it with --nv (Apptainer), --gpus all (Docker)"
        return "there is no /dev/nvidia0: no GPU, or its driver is not loaded (nvidia-smi)"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"{error} (does nvidia-smi work?)"
    return "the driver shows none (nvidia-smi)"


def check_amp(cfg: CfgNode) -> None:
    """Check SOLVER.AMP against what there is, and what MODEL.DEVICE, which is resolved, can do."""
    name, device = cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE
    if name not in AMP_DTYPES:
        raise InputError(
            f"SOLVER.AMP.DTYPE is '{name}'; expected one of {', '.join(AMP_DTYPES)}."
            + nearest(name, AMP_DTYPES)
        )
    if not cfg.SOLVER.AMP.ENABLED:
        return
    if device == "cpu" and name == "float16":
        raise InputError(
            "SOLVER.AMP.DTYPE float16 needs a GPU. On a CPU use bfloat16, or SOLVER.AMP.ENABLED "
            "False."
        )
    # Tensor cores for bfloat16 came with NVIDIA's Ampere; before, it is emulated, and slow.
    if (
        device.startswith("cuda")
        and name == "bfloat16"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        raise InputError(
            f"SOLVER.AMP.DTYPE bfloat16: {torch.cuda.get_device_name(device)} has no such "
            "arithmetic. Use float16, whose loss is scaled."
        )
