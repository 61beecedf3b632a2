"""What makes a run this run and no other: the config keys and data that it may not change."""

from fnmatch import fnmatch
from typing import Any

from detectron2.config import CfgNode

from virtex_d2.runtime.errors import InputError

from .captions import caption_counts
from .data import PretrainData
from .weights import TOKENIZER_KEY

# What may differ between a run's parts: where things are, and what is watched how often. All other
# keys change the weights that the run ends with.
_MAY_CHANGE = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "CUDNN_BENCHMARK",
    "TEST.*",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DATA.TRAIN_CAPTIONS",
    "DATA.TRAIN_IMAGES",
    "DATA.TRAIN_LABELS",
    "DATA.TRAIN_SOURCES",
    "DATA.FORMAT",
    "DATA.VAL_*",
    "DATA.TOKENIZER",
    "DATA.VOCAB_SIZE",
    "DATA.INDEX_DIR",
    "DATA.NUM_WORKERS",
    "DATA.MAX_SKIPPED_SHARE",
    "SOLVER.CHECKPOINT_*",
)


class RunIdentity:
    """A checkpoint's part that refuses to go on as another run.

    Data may have moved, so that not its paths are kept but the vocabulary and how many images and
    captions there are.

    Args:
        cfg: of the run.
        data: what it trains on.
    """

    def __init__(self, cfg: CfgNode, data: PretrainData):
        self._keys = dict(_flat(cfg))
        self._data = {
            TOKENIZER_KEY: data.tokenizer.sha256[:12],
            "outputs": data.num_outputs,
            "read from pipes": data.stream is not None,
        }
        if data.train is not None and data.stream is None:
            self._data["training images"] = len(data.train.records)
            self._data["training captions"] = int(caption_counts(data.train.records).sum())

    def state_dict(self) -> dict:
        return {"keys": self._keys, "data": self._data}

    def load_state_dict(self, state: dict) -> None:
        """Raises:
        InputError: the checkpoint is of a run with other keys or data; the message names them.
        """
        differing = [
            f"{name} was {before[name]}, now it is {now[name]}"
            for before, now in ((state["keys"], self._keys), (state["data"], self._data))
            for name in before.keys() & now.keys()  # versions may know keys that others do not
            if before[name] != now[name]
        ]
        if differing:
            raise InputError(
                f"--resume: the checkpoint is of another run: {'; '.join(sorted(differing))}. "
                "Resume with what the run began with, or start another one in an OUTPUT_DIR of its "
                "own, from these weights with MODEL.WEIGHTS."
            )


def _flat(node: CfgNode, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys that may not change, with their values as text."""
    found: list[tuple[str, str]] = []
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode):
            found += _flat(value, f"{key}.")
        elif not any(fnmatch(key, pattern) for pattern in _MAY_CHANGE):
            found.append((key, _as_text(value)))
    return found


def _as_text(value: Any) -> str:
    """Lists and tuples are one in YAML."""
    return str(list(value) if isinstance(value, tuple) else value)
