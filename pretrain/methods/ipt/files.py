"""Checkpoints of IPT: the released ones and this project's, loaded whole or refused.

The released files, `IPT_sr2.pt` and others (huawei-noah/Pretrained-IPT), are state dicts and say
nothing besides; `restorer.safetensors` has the same names, and says of which tasks it is, as the
checkpoints of a run do.
"""

import logging
import os
import re
from dataclasses import dataclass

import torch

from pretrain.methods.ipt.network import IPT, Sizes, build_ipt, sizes_of
from pretrain.methods.ipt.origin import Origin, origin_of, released_state, tasks_of
from pretrain.methods.ipt.tasks import Task, parse_task
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import require_file, sha256
from virtex_d2.engine.safe_load import read_tensors

logger = logging.getLogger(__name__)

EXPORTED = "restorer.safetensors"  # in the folder of a run

# What no tensor tells. The released networks, and the other framework's smaller ones, have tokens
# of this width and so many heads.
_RELEASED_WIDTH, _RELEASED_HEADS = 576, 12
_RELEASED_NAMES = {
    "IPT_denoise30.pt": "noise30",
    "IPT_denoise50.pt": "noise50",
    "IPT_derain.pt": "derain",
}
# The protocol buffer that MindSpore writes: a value, in it a name, and its tensor's type.
_MINDSPORE = re.compile(
    rb"\n[\x80-\xff]{0,4}[\x00-\x7f]\n[\x00-\x7f][\w.]+\x12.{1,40}?"
    rb"\x12.(?:Float|BFloat|Int|UInt|Bool)\d*\x1a",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Restorer:
    """A network that restores images, in evaluation mode on the CPU.

    Attributes:
        path: of its file.
        sha256: of its file.
        network: the IPT.
        tasks: by number; "" where the file does not say which task it is.
    """

    path: str
    sha256: str
    network: IPT
    tasks: tuple[str, ...]

    def find(self, name: str = "") -> tuple[Task, int]:
        """The task of this name, and its number in the network; "" is the only one there is."""
        scales = self.network.sizes.scales
        if not name:
            if len(self.tasks) > 1 or not self.tasks[0]:
                raise InputError(
                    f"{self.path}: restores {self._told()}; say what is to be done with --task."
                )
            name = self.tasks[0]
        task = parse_task(name)
        if name in self.tasks:
            return task, self.tasks.index(name)
        unnamed = [number for number, told in enumerate(self.tasks) if not told]
        if task.scale == 1 and len(unnamed) == 1:
            logger.warning(
                "%s does not say what it restores, only that it does not enlarge: it is taken to "
                "be of %s.",
                *(self.path, name),
            )
            return task, unnamed[0]
        enlarge = task.scale > 1 and task.scale not in scales
        wrong = f"; no part of it enlarges {task.scale} times" if enlarge else ""
        raise InputError(
            f"{self.path}: is not of task {name}: it restores {self._told()}{wrong}. Give one of "
            f"these tasks, or a checkpoint of {name}."
        )

    def _told(self) -> str:
        return ", ".join(
            name or "one task of the same size that it does not name" for name in self.tasks
        )


def read_restorer(path: str, heads: int | None = None) -> Restorer:
    """Load a checkpoint of IPT; every tensor must fit, and none may be left over.

    Args:
        path: a released `IPT_*.pt`, a `restorer.safetensors`, the folder of a run with one, or a
            run's own checkpoint.
        heads: of attention, where neither the file nor its width tells.
    """
    path = os.path.join(path, EXPORTED) if os.path.isdir(path) else path
    require_file(path)
    _refuse_mindspore(path)
    stored = read_tensors(path)
    state = released_state(stored)
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(
            f"{path}: expected tensors by name, as in released IPT_*.pt and in {EXPORTED}; found "
            f"{strange[0]!r}, which is none."
        )
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    origin = origin_of(stored)
    sizes = _sizes(path, state, origin, heads)
    network = build_ipt(state, sizes, path)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"{path}: {len(broken)} of its tensors hold NaN or Inf, the first is {broken[0]}. "
            "It cannot restore anything: take an earlier one, or download it again."
        )
    tasks = tasks_of(origin, sizes, path) or _unsaid(path, sizes)
    return Restorer(path, sha256(path), network, tasks)


def _sizes(path: str, state: dict[str, torch.Tensor], origin: Origin, heads: int | None) -> Sizes:
    if origin.heads and heads not in (None, origin.heads):
        raise InputError(
            f"{path}: has {origin.heads} heads of attention, --heads says {heads}. Leave it out."
        )
    heads = origin.heads or heads
    if heads is None:
        # any number that divides the width would load
        sizes = sizes_of(state, path, heads=1)
        if sizes.width != _RELEASED_WIDTH:
            raise InputError(
                f"{path}: its tokens have {sizes.width} channels, those of the released networks "
                f"{_RELEASED_WIDTH}, and no tensor tells how many heads of attention share them. "
                "Say it with --heads."
            )
        heads = _RELEASED_HEADS
    try:
        return sizes_of(state, path, heads, origin.positions or "once")
    except InputError as error:
        raise error if path in str(error) else InputError(f"{path}: {error}") from None


def _unsaid(path: str, sizes: Sizes) -> tuple[str, ...]:
    """Names of the tasks of a file that says none: by what they enlarge, and by released names."""
    by_name = _RELEASED_NAMES.get(os.path.basename(path), "") if len(sizes.scales) == 1 else ""
    return tuple(f"x{scale}" if scale > 1 else by_name for scale in sizes.scales)


def _refuse_mindspore(path: str) -> None:
    with open(path, "rb") as file:
        if _MINDSPORE.match(file.read(512)):
            raise InputError(
                f"{path}: is a checkpoint of MindSpore, whose IPT is another implementation with "
                "other names, trained on its own: its authors say that such files and those of the "
                "PyTorch release are not interchangeable. Give an IPT_*.pt of the latter."
            )
