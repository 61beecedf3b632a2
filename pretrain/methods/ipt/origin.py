"""What a checkpoint of IPT says of itself besides its tensors: its tasks, and what no shape tells.

Ours say it: checkpoints of a run by the run's config, restorer.safetensors by its metadata. The
released files say nothing.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from pretrain.methods.ipt.network import Sizes
from pretrain.methods.ipt.tasks import SIX_TASKS, parse_task
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.safe_load import StoredCheckpoint, whole_content

PREFIX = "network."  # of a run's tensors, before the released names


class Origin(NamedTuple):
    """Attributes are empty or 0 where the file does not say."""

    tasks: tuple[str, ...] = ()
    heads: int = 0
    positions: str = ""

    def metadata(self) -> dict[str, str]:
        """For a safetensors file, from which `origin_of` has it back."""
        return {
            "tasks": ",".join(self.tasks),
            "heads": str(self.heads),
            "positions": self.positions,
        }


def origin_of(stored: StoredCheckpoint) -> Origin:
    """What the file says."""
    said = stored.metadata
    if not said and isinstance(stored.content, dict):
        run = stored.content.get("run")
        keys = run.get("keys") if isinstance(run, Mapping) else None
        if isinstance(keys, Mapping):
            names = ("tasks", "heads", "positions")
            said = {name: str(keys.get(f"IPT.{name.upper()}", "")) for name in names}
    heads = said.get("heads", "")
    return Origin(
        tuple(re.findall(r"\w+", said.get("tasks", ""))),
        int(heads) if heads.isdecimal() else 0,
        said.get("positions", ""),
    )


def released_state(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """The file's tensors by released names: of a run's checkpoint, or of a state dict alone."""
    content = whole_content(stored)
    state = content.get("model", content)
    if not isinstance(state, dict):
        raise InputError(f"{stored.path}: expected tensors by name in 'model', found none.")
    return {
        name.removeprefix("module.").removeprefix(PREFIX): value for name, value in state.items()
    }


def tasks_of(origin: Origin, sizes: Sizes, path: str) -> tuple[str, ...] | None:
    """The names of the tasks in a checkpoint, in order; None where it does not say.

    Six unnamed tasks of the released scales are those of the released six-task checkpoint.
    """
    names = origin.tasks
    if not names and sizes.scales == tuple(parse_task(name).scale for name in SIX_TASKS):
        names = SIX_TASKS
    if names and tuple(parse_task(name).scale for name in names) != sizes.scales:
        raise InputError(
            f"{path}: says that its tasks are {', '.join(names)}, but its tails enlarge by "
            f"{', '.join(map(str, sizes.scales))}. Export it again."
        )
    return names or None
