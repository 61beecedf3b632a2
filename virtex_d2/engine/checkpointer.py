"""Checkpoints that are whole or absent, and that load without running code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from virtex_d2.engine.background import State, StateWriter
from virtex_d2.engine.checksum import save_with_checksum
from virtex_d2.engine.disk import not_written, stop_where_disk_is_full
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import TEMPORARY_PREFIX, atomic_path, read_checkpoint, read_numpy_pickle
from virtex_d2.engine.last_checkpoint import LAST_CHECKPOINT, has_checkpoint, last_whole_checkpoint
from virtex_d2.engine.retention import Retention
from virtex_d2.engine.snapshot import num_bytes

# What a killed process may have left of those files that are written at checkpoints.
_LEFTOVERS = ("*.pth", "*.safetensors", f"{LAST_CHECKPOINT}-*")


class _AtomicMixin:
    """Over a `Checkpointer`: the same files, which cannot be lost.

    A kill at any moment leaves `last_checkpoint` naming a whole checkpoint: the checkpoint is
    complete on disk before the name is written, and each appears by a rename. A file has its
    checksum in it, and is read with tensors only.

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

        self.writer.wait()
        self._remove_leftovers()
        self.logger.info("Saving checkpoint to %s", path)
        self.writer.write(self.states(**more), action)

    def _remove_leftovers(self) -> None:
        for pattern in _LEFTOVERS:  # of killed processes; in this one nothing is being written
            for leftover in Path(self.save_dir).glob(f"{TEMPORARY_PREFIX}{pattern}"):
                leftover.unlink(missing_ok=True)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let `last_checkpoint` name a file of the same folder."""
        with atomic_path(Path(self.save_dir) / LAST_CHECKPOINT) as temporary:
            temporary.write_text(last_filename_basename, encoding="utf-8")

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

    def get_all_checkpoint_files(self) -> list[str]:
        """Every checkpoint in the folder, without files that a killed save left."""
        files = super().get_all_checkpoint_files()
        return [file for file in files if not Path(file).name.startswith(TEMPORARY_PREFIX)]

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)


class AtomicCheckpointer(_AtomicMixin, Checkpointer):
    """fvcore's `Checkpointer` with atomic writes and safe reads.

    `load` returns what the file holds besides the model and the checkpointables.
    """


class AtomicDetectionCheckpointer(_AtomicMixin, DetectionCheckpointer):
    """detectron2's `DetectionCheckpointer` with atomic writes and safe reads.

    Reads .pth files (a bare state dict too) and the model zoo's .pkl files.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            loaded = read_checkpoint(filename)
            return loaded if "model" in loaded else {"model": loaded}
        data = read_numpy_pickle(filename)
        if "model" in data and "__author__" in data:
            return data
        # Caffe2's flat form: the weights under "blobs" or at the top, and momentum among them.
        blobs = data.get("blobs", data)
        weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
