"""torch.compile for the training step of a backbone: fewer, larger kernels, from generated code."""

import torch

from virtex_d2.engine.errors import InputError


def require_compiler(device: torch.device) -> None:
    """Compile something small, so that what is missing is told before there is a run to lose."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    try:
        torch.compile(small, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of nearly any kind: its backends' and those of what they start
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"MODEL.VISUAL.COMPILE True: torch.compile does not work on this machine for "
            f"{device.type}: {reason} It needs a C++ compiler (g++, or "
            "what CXX names) on a CPU, Triton and a C compiler on a GPU; MODEL.VISUAL.COMPILE "
            "False needs neither."
        ) from error
