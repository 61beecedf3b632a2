"""What makes a run this run and no other: the config keys and data that it may not change."""

from detectron2.config import CfgNode

from pretrain.data.records import caption_counts
from pretrain.methods.captioning.samples import PretrainData
from pretrain.weights import TOKENIZER_KEY
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.same_config import differences, matches, texts

# What may differ between a run's parts: where things are, and what is watched how often. All other
# keys change the weights that the run ends with.
_MAY_CHANGE = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "CUDNN_BENCHMARK",
    "TEST.*",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VISUAL.RECOMPUTE",
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
        self._keys = {k: value for k, value in texts(cfg).items() if not matches(k, _MAY_CHANGE)}
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
        """Raise InputError if the checkpoint is of a run with other keys or data; the message names
        them.
        """
        differing = [
            f"{name} was {before}, now it is {now}"
            for kept, own in ((state["keys"], self._keys), (state["data"], self._data))
            for name, (before, now) in differences(kept, own).items()
        ]
        if differing:
            raise InputError(
                f"--resume: the checkpoint is of another run: {'; '.join(sorted(differing))}. "
                "Resume with what the run began with, or start another one in an OUTPUT_DIR of its "
                "own, from these weights with MODEL.WEIGHTS."
            )
