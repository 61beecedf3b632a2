"""Checkpoints that are whole or absent, and that load without running code."""

import copy
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from virtex_d2.engine.device import release_freed_memory
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import (
    TEMPORARY_PREFIX,
    atomic_path,
    checksum_damage,
    not_written,
    save_with_checksum,
    stop_where_disk_is_full,
    write_text,
)
from virtex_d2.engine.safe_load import StoredCheckpoint, read_checkpoint, read_stored, whole_content

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
# What a killed process may have left of those files that are written at checkpoints.
_LEFTOVERS = ("*.pth", "*.safetensors", f"{LAST_CHECKPOINT}-*")
# fvcore's names: model_0000999.pth is what there was after iteration 999, the thousandth.
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

State = Mapping[str, Any]


# --- written beside training


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def num_bytes(state: Any) -> int:
    """What the tensors of a state take, in bytes; shared memory counts once."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(state)}
    return sum(sizes.values())


class Snapshot:
    """Takes copies of states in the CPU's memory; each one's memory is that of the one before.

    To get it anew from the system costs several times the copying. What shares memory (tied
    weights) shares it in the copy too, so that a file of the copy has each tensor once.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def take(self, state: State) -> dict[str, Any]:
        """A deep copy with all tensors on the CPU. What an earlier call gave is overwritten."""
        free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        for storage in self._storages:
            free[storage.nbytes()].append(storage)
        copies: dict[int, torch.UntypedStorage] = {}
        memo: dict[int, Any] = {}  # of deepcopy: what it finds here, by identity, it does not copy
        for tensor in tensors_in(state):
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:
                same_size = free[storage.nbytes()]
                own = same_size.pop() if same_size else torch.UntypedStorage(storage.nbytes())
                copies[storage._cdata] = own.copy_(storage)
            memo[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
                copies[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        self._storages = list(copies.values())
        return copy.deepcopy(dict(state), memo)


class StateWriter:
    """Writes states one after the other: in place, or in a thread while training goes on.

    In the thread it writes a copy (`Snapshot`), for which the CPU's memory must have room once
    more. A thread and no process: a forked one could not use CUDA nor be sure of its locks, and a
    spawned one would need the tensors in shared memory, of which containers have little. It logs
    nothing, because loader workers are forked while it runs.

    An error of the thread is raised by the next `check`, `wait` or `write`. The interpreter's end
    waits for the thread; `os._exit` and signals do not: before these, `wait`.
    """

    def __init__(self, background: bool = False):
        self._snapshot = Snapshot() if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: State, action: Callable[[State], None]) -> None:
        """Wait for the write before, then call `action(state)`, or start to, with a copy."""
        self.wait()
        if self._snapshot is None:
            action(state)
            return
        copied = self._snapshot.take(state)
        # Not a daemon: what has been begun is finished before the interpreter ends.
        self._thread = threading.Thread(target=self._run, args=(action, copied), name="checkpoint")
        self._thread.start()

    def reserve(self, state: State) -> None:
        """Take the memory that copies of such states will need, so that a lack of it shows now."""
        if self._snapshot is not None:
            self.wait()
            self._snapshot.take(state)

    def wait(self) -> None:
        """Return when all is on disk; raises what the thread has raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the thread has raised, once, without waiting."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[State], None], state: State) -> None:
        try:
            action(state)
        except BaseException as error:
            self._error = error


# --- which numbered checkpoints stay


def iteration_of(name: str) -> int | None:
    """The iteration in a name such as model_0000999.pth; None in others."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The files model_<iteration>.pth of a folder, by iteration, in order."""
    found = {iteration_of(path.name): path for path in folder.glob("model_*.pth")}
    found.pop(None, None)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Retention:
    """Keep the last so many checkpoints, and one of every so many iterations for good.

    fvcore's `max_to_keep` knows the checkpoints of its own process only; here the folder is asked.
    What has another name (model_final, model_best, model_ema) is never removed.
    """

    last: int = 0  # how many; 0: all. With 1 there is none to fall back to when it is damaged
    every: int = 0  # in iterations; the first checkpoint after each so many stays. 0: none does

    def __post_init__(self) -> None:
        if self.last < 0 or self.every < 0:
            raise InputError(
                f"SOLVER.CHECKPOINT_KEEP_LAST is {self.last} and CHECKPOINT_KEEP_EVERY "
                f"{self.every}; expected a number of checkpoints and one of iterations, or 0."
            )

    def removable(self, numbers: list[int], newest: int) -> list[int]:
        """Which of the iterations with a checkpoint may lose it, once `newest` has one.

        Later ones than `newest` are of a part of the run that is being repeated: they do not count
        as its last ones, and stay until they are written again.
        """
        if not self.last:
            return []
        numbers = sorted(number for number in numbers if number <= newest)
        for_good: dict[int, int] = {}
        for number in numbers if self.every else ():
            for_good.setdefault((number + 1) // self.every, number)
        for_good.pop(0, None)  # before the first `every` iterations
        return [number for number in numbers[: -self.last] if number not in for_good.values()]

    def prune(self, folder: Path, name: str) -> None:
        """Remove what may go after `name`, such as "model_0000999.pth", was written whole."""
        newest = iteration_of(name)
        if newest is not None and self.last:
            files = numbered_checkpoints(folder)
            for number in self.removable(list(files), newest):
                files[number].unlink(missing_ok=True)

    def count(self, first: int, last: int, period: int) -> int:
        """How many numbered checkpoints there are at most at a time.

        Args:
            first, last: iterations that are trained, from `first` to before `last`.
            period: iterations between checkpoints.
        """
        written = last // period - first // period
        if not self.last:
            return written
        for_good = last // self.every - first // self.every + 1 if self.every else 0
        # One more than are kept: the oldest goes when the newest is there.
        return min(written, self.last + 1 + for_good)


# --- from which checkpoint a run goes on


def has_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether there is something to resume: `last_checkpoint`, or a numbered checkpoint.

    A kill after the first checkpoint and before `last_checkpoint` leaves the one without the other.
    """
    folder = Path(folder)
    return (folder / LAST_CHECKPOINT).is_file() or bool(numbered_checkpoints(folder))


def last_whole_checkpoint(folder: str | os.PathLike, tell: bool = True) -> str:
    """The file that `last_checkpoint` names; where it is damaged or missing, the one before.

    To be called in all processes: the first looks, and tells the others. Each candidate is held
    against its checksum, or read where it has none.

    Args:
        folder: OUTPUT_DIR, of which `has_checkpoint` is true.
        tell: whether to log what was found where it is not the last.
    """
    path, problems, refused = "", [], ""
    if comm.is_main_process():
        try:
            path, problems = _find(Path(folder))
        except InputError as error:
            refused = str(error)
    path, problems, refused = comm.all_gather((path, problems, refused))[0]
    if refused:
        raise InputError(refused)
    if problems and tell:
        logger.warning(
            "THE LAST CHECKPOINT CANNOT BE USED: %s.\nThe run goes on from an older one, %s, and "
            "trains what came after it again.",
            "; ".join(problems),
            path,
        )
    return path


def _find(folder: Path) -> tuple[str, list[str]]:
    """The first whole one, and what is wrong with those that would have come before it."""
    candidates, problems = _candidates(folder)
    for path in candidates:
        found = _harm(path)
        if not found:
            return str(path), problems
        problems.append(f"{path}: {found}")
    raise InputError(
        f"OUTPUT_DIR {folder}: there is nothing to resume from: {'; '.join(problems)}. Copy a "
        f"whole checkpoint there and write its name into {LAST_CHECKPOINT}, or begin anew in "
        "another OUTPUT_DIR."
    )


def _harm(path: Path) -> str:
    """Why a file cannot be loaded; "" where it can."""
    if not path.is_file():
        return "there is no such file"
    found = checksum_damage(path)
    if found is None:  # of stock detectron2: only reading it tells all
        try:
            read_checkpoint(path)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
    return found or ""


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """The last checkpoint and those before it, newest first."""
    older = sorted(numbered_checkpoints(folder).items(), reverse=True)
    try:
        name = (folder / LAST_CHECKPOINT).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return [path for _, path in older], [f"{folder / LAST_CHECKPOINT}: there is no such file"]
    if not name or "\0" in name:
        problem = f"{folder / LAST_CHECKPOINT}: names no file ({name[:80]!r})"
        return [path for _, path in older], [problem]
    last = iteration_of(name)
    # Later ones than the last are of a part of the run that was being repeated.
    return [folder / name, *(path for it, path in older if last is None or it < last)], []


# --- the checkpointers


class _AtomicMixin:
    """Over a `Checkpointer`: a kill at any moment leaves `last_checkpoint` naming a whole file.

    A checkpoint is complete on disk before its name is written, and each appears by a rename. A
    file has its checksum in it, and is read with tensors only.

    Args:
        *args, **kwargs: of fvcore's or detectron2's class.
        writer: shared by all checkpointers of a folder in a process; None: files are written in
            place, before `save` returns.
        retention: which checkpoints are removed when a newer one is there; None: none.
        after_save: called with the state in a checkpoint once it is the last one, on disk; in the
            writer's thread. Writes what must not be newer than the checkpoint.

    Attributes:
        last_saved: name of the last checkpoint that this process has saved; "" before.
        resumed_from: the checkpoint from which the run has gone on, which is not the last one where
            that is damaged; "" of a run that has begun anew.
    """

    last_saved = ""
    resumed_from = ""

    def __init__(
        self,
        *args: Any,
        writer: StateWriter | None = None,
        retention: Retention | None = None,
        after_save: Callable[[State], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.writer = writer or StateWriter()
        self.retention = retention or Retention()
        self._after_save = after_save

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<save_dir>/<name>.pth` (model, checkpointables, `kwargs`), then tag it as last.

        With a writer in the background it returns when the state has been copied.
        """

        def finish(state: State) -> None:
            self.tag_last_checkpoint(f"{name}.pth")
            self.retention.prune(Path(self.save_dir), f"{name}.pth")
            if self._after_save:
                self._after_save(state)

        self._write(name, kwargs, finish)
        self.last_saved = name

    def save_beside(
        self, name: str, then: Callable[[State], None] | None = None, **kwargs: Any
    ) -> None:
        """As `save`, without becoming the last checkpoint; `then` is called with the state."""
        self._write(name, kwargs, then)

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        self.writer.wait()

    def states(self, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint of this moment holds: model, checkpointables and `kwargs`."""
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        return {"model": self.model.state_dict(), **states, **kwargs}

    def _write(self, name: str, more: dict[str, Any], then: Callable[[State], None] | None) -> None:
        if not (self.save_dir and self.save_to_disk):
            return
        path = Path(self.save_dir) / f"{name}.pth"

        def action(state: State) -> None:
            try:
                with atomic_path(path) as temporary:
                    save_with_checksum(state, temporary)
            except OSError as error:
                raise not_written(path, error, num_bytes(state)) from error
            if then:
                with stop_where_disk_is_full(path.parent):
                    then(state)
            release_freed_memory()

        self.writer.wait()
        for pattern in _LEFTOVERS:  # of killed processes; in this one nothing is being written
            for leftover in Path(self.save_dir).glob(f"{TEMPORARY_PREFIX}{pattern}"):
                leftover.unlink(missing_ok=True)
        self.logger.info("Saving checkpoint to %s", path)
        self.writer.write(self.states(**more), action)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file of the same folder that a run goes on from."""
        write_text(Path(self.save_dir) / LAST_CHECKPOINT, last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume in the folder."""
        return bool(self.save_dir) and has_checkpoint(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As the base class; a last checkpoint that is damaged falls back to the one before."""
        if resume and self.has_checkpoint():
            self.resumed_from = last_whole_checkpoint(self.save_dir)
            return self.load(self.resumed_from)
        return self.load(path, checkpointables=[])

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base class."""
        try:
            return super().load(path, *args, **kwargs)
        except (AssertionError, FileNotFoundError) as error:
            if Path(path).is_file() or "://" in path:
                raise
            raise InputError(
                f"{path}: expected a checkpoint, found no file there. Check MODEL.WEIGHTS, or, "
                "when resuming, what last_checkpoint in the output folder names."
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)


class AtomicCheckpointer(_AtomicMixin, Checkpointer):
    """fvcore's: `load` returns what the file holds besides the model and the checkpointables."""


class AtomicDetectionCheckpointer(_AtomicMixin, DetectionCheckpointer):
    """detectron2's: reads .pth files (a bare state dict too) and the model zoo's .pkl files."""

    # A file that was read before it is to be loaded.
    opened: StoredCheckpoint | None = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        stored, self.opened = self.opened, None
        if stored is None or stored.path != filename:
            stored = read_stored(filename)
        data = dict(whole_content(stored))
        if stored.format != "pickle":
            return data if "model" in data else {"model": data}
        if "model" in data and "__author__" in data:
            return data
        # Caffe2's flat form: the weights under "blobs" or at the top, and momentum among them.
        blobs = data.get("blobs", data)
        weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
