"""Checkpoints that are whole or absent, and that load without running code."""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from .errors import InputError
from .files import TEMPORARY_PREFIX, atomic_path, read_checkpoint, read_numpy_pickle


class _AtomicMixin:
    """Over a `Checkpointer`: the same files, written atomically, read with tensors only.

    A kill at any moment leaves `last_checkpoint` naming a whole checkpoint: the checkpoint is
    complete on disk before the name is written, and each appears by a rename.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<save_dir>/<name>.pth` (model, checkpointables, `kwargs`), then tag it as last."""
        if self.save_dir and self.save_to_disk:
            self.save_beside(name, **kwargs)
            self.tag_last_checkpoint(f"{name}.pth")

    def save_beside(self, name: str, **kwargs: Any) -> None:
        """As `save`, in the process that may write, without becoming the last checkpoint."""
        path = Path(self.save_dir) / f"{name}.pth"
        for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}*.pth"):
            leftover.unlink(missing_ok=True)  # of a killed save; one process saves at a time
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_path(path) as temporary:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, temporary)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let `last_checkpoint` name a file of the same folder."""
        with atomic_path(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename, encoding="utf-8")

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base class.

        Raises:
            InputError: no such file, a truncated one, or one that holds code.
        """
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
