"""How tests start a tool: one process, or several of torchrun."""

import sys


def python(processes: int = 1) -> list[str]:
    """What stands before a script, to run it in so many processes; torchrun chooses a free port."""
    if processes == 1:
        return [sys.executable]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}"]
