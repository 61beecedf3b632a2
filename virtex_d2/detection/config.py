"""The keys that VirTex-D2 adds to detectron2's config, and the defaults that it changes."""

from detectron2.config import CfgNode as CN  # noqa: N817 - as in detectron2
from detectron2.config import get_cfg


def get_virtex_cfg() -> CN:
    """detectron2's config with the keys and defaults of `add_virtex_config`."""
    cfg = get_cfg()
    add_virtex_config(cfg)
    return cfg


def add_virtex_config(cfg: CN) -> None:
    """Add VIRTEX.* and the defaults that caption-pretrained backbones want, in place.

    Preprocessing is torchvision's, as in pretraining: RGB, its mean and std on the scale 0-255,
    stride in the 3x3 convolution. The whole backbone is trained (VirTex, arXiv 2006.06666).
    """
    cfg.VIRTEX = CN()
    # Data sets to register before the run, each one of
    #   [name, "coco", annotation file, image folder]
    #   [name, "lvis", annotation file, folder above the image folders]
    #   [name, "voc", folder, split] or [name, "voc", folder, split, [class, ...]]
    # Paths may hold environment variables; $DETECTRON2_DATASETS is "datasets" where it is not set,
    # as in detectron2. See docs/datasets.md.
    cfg.VIRTEX.DATASETS = []
    # The share of each training set's images that is used, in (0, 1], and the seed that draws them.
    # Shares of one seed are nested: 1 % of the images are among 10 %.
    cfg.VIRTEX.FRACTION = 1.0
    cfg.VIRTEX.FRACTION_SEED = 0
    # The fraction of the training images that may be undecodable. They are named, counted and
    # replaced by others; with more of them the run stops.
    cfg.VIRTEX.MAX_SKIPPED_SHARE = 0.01
    # The fraction of a data set's annotations whose box may be empty or outside its image, or whose
    # mask may be none. They are named, and detectron2 clips or drops them; with more of them the
    # run does not start. Not 0, because COCO's own annotations have a few of zero height.
    cfg.VIRTEX.MAX_BAD_BOX_SHARE = 0.0001
    # Keep activations as (N, H, W, C) in memory: faster with SOLVER.AMP on CPUs and on GPUs.
    cfg.VIRTEX.CHANNELS_LAST = False
    # The images of an update (SOLVER.IMS_PER_BATCH, over all processes) come in so many passes,
    # whose gradients are summed: as much less memory. Iterations stay updates.
    cfg.VIRTEX.ACCUMULATE = 1
    # An exponential moving average of the weights, in every checkpoint beside them (`ema`).
    cfg.VIRTEX.EMA = CN({"ENABLED": False})
    # Between 0 and 1; the average spans some 1 / (1 - DECAY) iterations, early ones fewer.
    cfg.VIRTEX.EMA.DECAY = 0.9998
    # Whether the average is evaluated, or the weights themselves; with --eval-only too.
    cfg.VIRTEX.EMA.EVALUATE = True
    # What the pretrained network saw (INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD,
    # MODEL.RESNETS.STRIDE_IN_1X1) against this config: "check" refuses a difference, "auto" sets
    # the keys, "config" believes the config instead of the file.
    cfg.VIRTEX.PREPROCESSING = "check"
    # Whose checkpoint MODEL.WEIGHTS is, where its keys do not decide: a name of
    # docs/checkpoints.md. "": told by the keys.
    cfg.VIRTEX.LAYOUT = ""
    # The network to take where a file holds several, such as "momentum". "": the layout's first.
    cfg.VIRTEX.COPY = ""
    # What stands before the names of the network to take, where layout and copy do not tell:
    # "online.net.", or with the place of the state dict "state_dict/online.net.".
    cfg.VIRTEX.PREFIX = ""
    # Iterations between lines of the log, metrics.json and TensorBoard; also between exchanges of
    # what processes have skipped.
    cfg.VIRTEX.LOG_PERIOD = 20
    # After loading, compare the detector's stages with those of the pretrained network.
    cfg.VIRTEX.PROBE = True

    # "auto" is CUDA where there is a device, else the CPU; the choice is logged.
    cfg.MODEL.DEVICE = "auto"
    # "random" or "" is detectron2's random start, "random_zero_scales" the same with the scales of
    # the residual blocks' last norms at 0. Else a checkpoint with a ResNet, of any layout in
    # docs/checkpoints.md, or a detector's checkpoint: told by what is in the file.
    cfg.MODEL.WEIGHTS = ""
    # Number of classes; -1: as many as the data sets have categories.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    cfg.MODEL.RETINANET.NUM_CLASSES = -1
    # Number of backbone stages that are not trained, the stem first; their norms are FrozenBN.
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    # The backbone is trained at so many times the learning rate of the rest.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # What SOLVER.AMP.ENABLED computes losses in: "bfloat16" (CPUs, and GPUs from Ampere on) or
    # "float16" (any GPU; the loss is scaled).
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    # Checkpoints are copied to the CPU's memory, which must have room for one more, and written
    # from there while training goes on. False: training waits until they are on disk.
    cfg.SOLVER.CHECKPOINT_BACKGROUND = True
    # How many of the last checkpoints stay (0: all; 1 leaves none to fall back to), and after how
    # many iterations each the first checkpoint stays for good (0: none). model_final and model_ema
    # are never removed.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 0
    # Seeds initialisation, data order and augmentation. Negative: drawn, and logged.
    cfg.SEED = 0


# What a resumed run may change; all else changes the weights that it ends with. As in pretraining
# that leaves where things are, what is watched and how often, and how the same numbers are
# computed, up to rounding. docs/resuming.md has them in a table.
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


def may_change(cfg: CN) -> tuple[str, ...]:
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
