"""Every key of a probe, with its unit and default."""

from detectron2.config import CfgNode as CN  # noqa: N817 - as in detectron2
from detectron2.config import get_cfg

from virtex_d2.engine.errors import InputError, nearest

TASKS = ("voc_svm", "linear", "finetune")
_STAGES = ("res2", "res3", "res4", "res5")


def get_probe_cfg() -> CN:
    """A fresh, unfrozen config. Its recipes are in configs/probes."""
    cfg = CN()
    cfg.VERSION = 2
    # "voc_svm": one-vs-all linear SVMs on frozen features. "linear": a softmax classifier on frozen
    # features. "finetune": the same, and the backbone is trained with it.
    cfg.TASK = "voc_svm"
    # Seeds random backbones, classifiers, data order and augmentation. Negative: drawn, and logged.
    cfg.SEED = 0
    # Everything a run writes: results.json, per_class.csv, log.txt, config.yaml, checkpoints.
    cfg.OUTPUT_DIR = "./output"
    cfg.CUDNN_BENCHMARK = False

    cfg.MODEL = CN()
    cfg.MODEL.DEVICE = "auto"
    # A checkpoint with a ResNet, of any layout in docs/checkpoints.md, or as of detectors a start
    # without one: "random" or "random_zero_scales".
    cfg.MODEL.WEIGHTS = ""
    # Set from the checkpoint; a config's values count for random starts alone.
    cfg.MODEL.RESNETS = get_cfg().MODEL.RESNETS.clone()
    # Whose features are judged, each by itself and averaged over all positions; "voc_svm" alone can
    # have several.
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    # "SyncBN" where the backbone is trained on several GPUs with few images each.
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE = CN()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]

    # As for detectors, docs/checkpoints.md; here the file is believed.
    cfg.VIRTEX = CN()
    cfg.VIRTEX.PREPROCESSING = "auto"
    cfg.VIRTEX.LAYOUT = ""
    cfg.VIRTEX.COPY = ""
    cfg.VIRTEX.PREFIX = ""
    cfg.VIRTEX.PROBE = True
    # As for detectors, docs/datasets.md: what DATA.FORMAT "detection" reads, and the share of its
    # training images that is used.
    cfg.VIRTEX.DATASETS = []
    cfg.VIRTEX.FRACTION = 1.0
    cfg.VIRTEX.FRACTION_SEED = 0

    cfg.INPUT = CN()
    cfg.INPUT.FORMAT = "RGB"
    # Pixels: the shorter side is scaled to RESIZE, then the central CROP x CROP is taken.
    cfg.INPUT.RESIZE = 256
    cfg.INPUT.CROP = 224
    # Training sees random crops of CROP, flipped half of the time, instead of the central one.
    # "finetune" always does. Without, frozen features are computed once and cached.
    cfg.INPUT.AUGMENT = False
    # Random crops: range of the area kept (fraction) and of the aspect ratio.
    cfg.INPUT.CROP_SCALE = (0.08, 1.0)
    cfg.INPUT.CROP_RATIO = (0.75, 4.0 / 3.0)

    cfg.DATA = CN()
    # "voc", "detection" (a detector's data sets, of COCO's, LVIS's and VOC's formats: which classes
    # are in an image), "folders" (a folder of images for each class) or "inaturalist" (JSON of 2017
    # to 2021).
    cfg.DATA.FORMAT = "voc"
    # The folder with Annotations, ImageSets/Main and JPEGImages; with the splits' folders; or that
    # the JSON's file names are relative to. May hold environment variables; $DETECTRON2_DATASETS is
    # "datasets" where it is not set, as for detectors.
    cfg.DATA.ROOT = ""
    # Splits: names in ImageSets/Main, folders in ROOT, or JSON files in ROOT. "detection": names of
    # VIRTEX.DATASETS or of detectron2's own, with commas between several.
    cfg.DATA.TRAIN = "trainval"
    cfg.DATA.TEST = "test"
    # "voc": the classes to report. Empty: VOC's twenty.
    cfg.DATA.CLASSES = []
    # The run stops when more than this fraction of the training images cannot be decoded; every
    # test image must.
    cfg.DATA.MAX_SKIPPED_SHARE = 0.01
    cfg.DATA.NUM_WORKERS = 4
    # Where features are kept, for all runs. May be removed at any time.
    cfg.DATA.CACHE_DIR = "output/features"

    cfg.SVM = CN()
    # The cost of each class is that of the best average precision over FOLDS folds.
    cfg.SVM.COSTS = [0.01, 0.1, 1.0, 10.0]
    cfg.SVM.FOLDS = 3
    # Weight of positives in the loss; negatives have 1.
    cfg.SVM.POSITIVE_WEIGHT = 2.0
    cfg.SVM.MAX_ITER = 2000
    # Training images whose objects of a class are all difficult: "exclude" or "negative".
    cfg.SVM.DIFFICULT = "exclude"
    # Processes that train classes beside each other.
    cfg.SVM.NUM_JOBS = 1

    cfg.SOLVER = CN()
    # Passes over the training set, rounded up to whole batches.
    cfg.SOLVER.EPOCHS = 100
    # Total images per iteration, over all processes.
    cfg.SOLVER.IMS_PER_BATCH = 256
    cfg.SOLVER.BASE_LR = 0.3
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    # "cosine" to 0, or "multistep": times GAMMA after each of the epochs STEPS.
    cfg.SOLVER.SCHEDULE = "cosine"
    cfg.SOLVER.STEPS = []
    cfg.SOLVER.GAMMA = 0.1
    # Epochs between checkpoints.
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    # Autocast to bfloat16.
    cfg.SOLVER.AMP = CN()
    cfg.SOLVER.AMP.ENABLED = False

    cfg.TEST = CN()
    # Epochs between evaluations; 0 evaluates at the end only.
    cfg.TEST.EVAL_PERIOD = 1
    # Images at a time, in each process, where nothing is trained. Changes no result.
    cfg.TEST.IMS_PER_BATCH = 64
    return cfg


def check_config(cfg: CN) -> None:
    """Refuse values that no run could use."""
    _check_choices(cfg)
    solver, test = cfg.SOLVER, cfg.TEST
    positive = {
        "INPUT.CROP": cfg.INPUT.CROP,
        "SOLVER.EPOCHS": solver.EPOCHS,
        "SOLVER.IMS_PER_BATCH": solver.IMS_PER_BATCH,
        "SOLVER.CHECKPOINT_PERIOD": solver.CHECKPOINT_PERIOD,
        "TEST.IMS_PER_BATCH": test.IMS_PER_BATCH,
        "SVM.NUM_JOBS": cfg.SVM.NUM_JOBS,
        "SVM.MAX_ITER": cfg.SVM.MAX_ITER,
    }
    for key, value in positive.items():
        if value < 1:
            raise InputError(f"{key} is {value}; expected at least 1.")
    if cfg.INPUT.RESIZE < cfg.INPUT.CROP:
        raise InputError(
            f"INPUT.RESIZE {cfg.INPUT.RESIZE} is smaller than INPUT.CROP {cfg.INPUT.CROP}: the "
            "crop would reach beyond the image. The paper has 256 and 224."
        )
    if not cfg.SVM.COSTS or any(cost <= 0 for cost in cfg.SVM.COSTS):
        raise InputError(f"SVM.COSTS is {cfg.SVM.COSTS}; expected positive numbers, such as 0.1.")
    if cfg.SVM.FOLDS < 2:
        raise InputError(f"SVM.FOLDS is {cfg.SVM.FOLDS}; cross-validation has at least 2 folds.")
    features = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    several = [name for name in _STAGES if name in features]
    if features != (several if cfg.TASK == "voc_svm" else ["res5"]) or features[-1:] != ["res5"]:
        raise InputError(
            f"MODEL.RESNETS.OUT_FEATURES is {features}; expected ['res5'], or with TASK voc_svm "
            f"some of {', '.join(_STAGES)} in this order, res5 among them."
        )
    if cfg.VIRTEX.FRACTION != 1 and cfg.DATA.FORMAT != "detection":
        raise InputError(
            f"VIRTEX.FRACTION is {cfg.VIRTEX.FRACTION}; only DATA.FORMAT detection takes a part of "
            "the images."
        )
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise InputError(f"SOLVER.STEPS is {solver.STEPS}; expected epochs in rising order.")


def _check_choices(cfg: CN) -> None:
    formats = ("voc", "detection") if cfg.TASK == "voc_svm" else ("folders", "inaturalist")
    choices = {
        "TASK": (cfg.TASK, TASKS),
        "SVM.DIFFICULT": (cfg.SVM.DIFFICULT, ("exclude", "negative")),
        "SOLVER.SCHEDULE": (cfg.SOLVER.SCHEDULE, ("cosine", "multistep")),
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, ("RGB", "BGR")),
        f"TASK {cfg.TASK}, DATA.FORMAT": (cfg.DATA.FORMAT, formats),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise InputError(
                f"{key} is '{value}'; expected one of {', '.join(known)}.{nearest(value, known)}"
            )
