"""Detector checkpoints: as detectron2 loads them, but never as a silent random start."""

import logging
from typing import Any

from virtex_d2.checkpoint.transfer import backbone_names
from virtex_d2.engine.backbone_file import Preprocessing
from virtex_d2.engine.checkpointer import AtomicDetectionCheckpointer
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


class DetectorCheckpointer(AtomicDetectionCheckpointer):
    """detectron2's `DetectionCheckpointer`, atomic, and it refuses files that do not fit.

    detectron2 warns where a file leaves tensors of the model as they are, and goes on. Here a file
    without a single tensor of the backbone is an error, and so is any tensor that is missing where
    the file must hold the whole detector: on resuming, and for evaluation.

    Args:
        model, save_dir, **kwargs: of `AtomicDetectionCheckpointer`.
        whole: whether every file must hold the whole detector.
        averaged: whether to load the moving average of the weights (VIRTEX.EMA) that a file holds
            beside them.
        preprocessing: what the detector is trained with; goes into every file.
    """

    def __init__(
        self,
        model: Any,
        save_dir: str = "",
        *,
        whole: bool = False,
        averaged: bool = False,
        preprocessing: Preprocessing | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, save_dir, **kwargs)
        self._whole = whole
        self._averaged = averaged
        self._preprocessing = preprocessing

    def states(self, **kwargs: Any) -> dict[str, Any]:
        """What goes into a file, with the preprocessing beside the tensors."""
        if self._preprocessing:
            kwargs = {"virtex_d2": self._preprocessing.metadata(), **kwargs}
        return super().states(**kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As detectron2's; `checkpointables` is None on resuming."""
        self._not_set: set[str] = set()
        self._path = path
        rest = super().load(path, checkpointables)
        if path and self._not_set:
            self._refuse(path, whole=self._whole or checkpointables is None)
        if checkpointables is None and self.checkpointables and "ema" in rest:
            logger.warning(
                "%s: holds an average of the weights, which this run drops: VIRTEX.EMA is off.",
                path,
            )
        return rest

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._averaged:
            checkpoint["model"] = self._average_of(checkpoint)
        names = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        wrong_shape = {name for name, *_ in incompatible.incorrect_shapes}
        missing = {name for name in incompatible.missing_keys if "num_batches" not in name}
        self._not_set, self._first_names = missing | wrong_shape, names[:3]
        self._class_counts = _class_counts(incompatible.incorrect_shapes, self.model)
        return incompatible

    def _average_of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        if "ema" in checkpoint:
            return checkpoint["ema"]["model"]
        if checkpoint.get("is_ema"):  # model_ema.pth: nothing else is in it
            return checkpoint["model"]
        raise InputError(
            f"{self._path}: holds no average of the weights (VIRTEX.EMA.ENABLED was False when it "
            "was trained). Add VIRTEX.EMA.EVALUATE False to evaluate the weights themselves."
        )

    def _refuse(self, path: str, whole: bool) -> None:
        state = getattr(self.model, "module", self.model).state_dict()
        not_set = {name.removeprefix("module.") for name in self._not_set}
        backbone = set(backbone_names(state).values())
        if backbone and backbone <= not_set:
            taken = (
                "A whole detector's checkpoint is needed here; a backbone alone detects nothing."
                if whole
                else "MODEL.WEIGHTS takes a detector's checkpoint, or a ResNet in one of the "
                "layouts of docs/checkpoints.md."
            )
            raise InputError(
                f"{path}: holds none of the detector's {len(backbone)} backbone tensors; its names "
                f"begin with {', '.join(self._first_names)}. {taken}"
            )
        if whole:
            raise InputError(
                f"{path}: {len(not_set)} of the detector's {len(state)} tensors are missing in it "
                f"or of another shape, the first: {', '.join(sorted(not_set)[:5])}."
                f"{self._class_counts} Use the config that it was trained with (config.yaml beside "
                "it)."
            )


def _class_counts(
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]], model: Any
) -> str:
    """What a classifier of another length says: it is the commonest reason."""
    model = getattr(model, "module", model)
    for name, found, expected in incorrect_shapes:
        if name.endswith("cls_score.weight"):
            known, here = found[0] - 1, expected[0] - 1  # one output more, for the background
            key = "MODEL.ROI_HEADS.NUM_CLASSES"
            if classes := getattr(model, "num_classes", 0):  # RetinaNet: of each anchor
                known, here = found[0] * classes // expected[0], classes
                key = f"MODEL.{type(model).__name__.upper()}.NUM_CLASSES"
            return f" It knows {known} classes, this config has {here} ({key})."
    return ""
