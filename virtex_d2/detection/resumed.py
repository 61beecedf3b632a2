"""Which keys of a detector's config may change between the parts of one run."""

from detectron2.config import CfgNode

# What remains may not: it changes the weights that the run ends with. As in pretraining
# (pretrain/identity.py) that leaves where things are, what is watched and how often, and how the
# same numbers are computed, up to rounding. docs/resuming.md has them in a table.
MAY_CHANGE = (
    # Where things are. Of data sets that is the folders: names stay in DATASETS.TRAIN.
    "OUTPUT_DIR",
    "VIRTEX.DATASETS",
    # What the run began with, and will not read again.
    "MODEL.WEIGHTS",
    "VIRTEX.PREPROCESSING",
    "VIRTEX.LAYOUT",
    "VIRTEX.COPY",
    "VIRTEX.PREFIX",
    "VIRTEX.PROBE",
    # What is evaluated, saved and shown, and how often; PreciseBN is among it where it has no part
    # in training, but its statistics are in the weights: these keys stay.
    "DATASETS.TEST",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.AUG.*",
    "*_TEST",
    "VIRTEX.EMA.EVALUATE",
    "SOLVER.CHECKPOINT_*",
    "VIRTEX.LOG_PERIOD",
    "VIS_PERIOD",
    # When to give up.
    "VIRTEX.MAX_SKIPPED_SHARE",
    "VIRTEX.MAX_BAD_BOX_SHARE",
    # How the same is computed.
    "MODEL.DEVICE",
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "VIRTEX.ACCUMULATE",
    "VIRTEX.CHANNELS_LAST",
)


def may_change(cfg: CfgNode) -> tuple[str, ...]:
    """Patterns of the keys that may differ when a run with this config goes on.

    The number of iterations is among them where the learning rate does not depend on it: the run is
    then the one that would have been that long from the start.
    """
    keys = MAY_CHANGE
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        keys += ("SOLVER.MAX_ITER",)
    if cfg.MODEL.META_ARCHITECTURE != "RetinaNet":  # without a part in it; its default has changed
        keys += ("MODEL.RETINANET.NUM_CLASSES",)
    return keys
