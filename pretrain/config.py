"""Every key of a pretraining run, with its unit and default.

The defaults are the VirTex base recipe (arXiv 2006.06666, section 3 and the released configs):
bicaptioning, ResNet-50, one decoder layer of width 1024, 500 000 iterations of 256 images.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode as CN  # noqa: N817 - as in detectron2

from virtex_d2.engine.config import load_config

_C = CN()
_C.VERSION = 2
# Seeds initialisation, data order, augmentation, dropout. Negative: drawn, and logged.
_C.SEED = 0
# Everything a run writes: log.txt, metrics.json, TensorBoard events, checkpoints, backbone.
_C.OUTPUT_DIR = "./output"
_C.CUDNN_BENCHMARK = True

_C.MODEL = CN()
# "auto" is CUDA where there is a device, else the CPU; the choice is logged.
_C.MODEL.DEVICE = "auto"
# What the network learns: a word of `pretrain.methods.method.METHODS`, or "package.module:Class".
_C.MODEL.OBJECTIVE = "bicaptioning"
# What to start from: a pretraining checkpoint, or a ResNet of any layout in docs/checkpoints.md; ""
# is random initialisation. With --eval-only a pretraining checkpoint.
_C.MODEL.WEIGHTS = ""

_C.MODEL.VISUAL = CN()
# A ResNet of torchvision, by its constructor's name: resnet18 ... resnet152, wide_resnet50_2.
_C.MODEL.VISUAL.NAME = "resnet50"
# The last norm scale of each residual block starts at 0 (Goyal et al., arXiv 1706.02677).
_C.MODEL.VISUAL.ZERO_INIT_RESIDUAL = True
# Where it does not: what it starts at, above 0. detectron2's random ResNets have 1.
_C.MODEL.VISUAL.RESIDUAL_SCALE = 1.0
# "BN" normalises by the images of a process (of a pass), "SyncBN" by those of all processes.
_C.MODEL.VISUAL.NORM = "BN"
# NHWC memory layout: faster convolutions on CPUs and tensor cores, same results up to rounding.
_C.MODEL.VISUAL.CHANNELS_LAST = True
# Compute whole blocks again in the backward pass instead of keeping them ("blocks"); "" is nothing.
# The same numbers with less memory and more time (docs/performance.md).
_C.MODEL.VISUAL.RECOMPUTE = ""
# Train what torch.compile makes of the backbone: other rounding, minutes at the start. It is not
# known to be faster anywhere: `tools/benchmark.py pretrain --compile` tells for a machine.
_C.MODEL.VISUAL.COMPILE = False

_C.MODEL.TEXTUAL = CN()
_C.MODEL.TEXTUAL.HIDDEN_SIZE = 1024
_C.MODEL.TEXTUAL.NUM_LAYERS = 1
# 0 means HIDDEN_SIZE / 64.
_C.MODEL.TEXTUAL.ATTENTION_HEADS = 0
# 0 means 4 * HIDDEN_SIZE.
_C.MODEL.TEXTUAL.FEEDFORWARD_SIZE = 0
_C.MODEL.TEXTUAL.DROPOUT = 0.1
# Where each decoder layer normalises: "post" (after the residual sum) or "pre".
_C.MODEL.TEXTUAL.NORM = "post"
# Tokens of a caption, [SOS] and [EOS] included; also the number of position embeddings.
_C.MODEL.TEXTUAL.MAX_LENGTH = 30

# Additions to a captioning objective, none of them VirTex's; 0 is without.
_C.MODEL.CAPTIONING = CN()
# Share of a target's probability that is spread over the vocabulary.
_C.MODEL.CAPTIONING.LABEL_SMOOTHING = 0.0
# Share of the samples whose words are all predicted at once, from the image alone (CapPa).
_C.MODEL.CAPTIONING.PARALLEL_SHARE = 0.0
# Weight of a token classification loss beside the captioning losses.
_C.MODEL.CAPTIONING.CLASSIFICATION_WEIGHT = 0.0

# Masked language modelling: share of a caption's pieces that are chosen (rounded up), and what
# becomes of them: [MASK], a random piece, or for the rest nothing.
_C.MODEL.MASKED_LM = CN()
_C.MODEL.MASKED_LM.SHARE = 0.15
_C.MODEL.MASKED_LM.MASK_PROB = 0.85
_C.MODEL.MASKED_LM.RANDOM_PROB = 0.1

# Which ResNet of the file MODEL.WEIGHTS is meant, as for detectors (docs/checkpoints.md); where one
# is said, it is taken alone. PREPROCESSING: "check" refuses a network that was trained with other
# pixels than pretraining's, "config" believes that it was not.
_C.VIRTEX = CN()
_C.VIRTEX.PREPROCESSING = "check"
_C.VIRTEX.LAYOUT = ""
_C.VIRTEX.COPY = ""
_C.VIRTEX.PREFIX = ""

_C.DATA = CN()
# Annotation format: a name in `pretrain.data.FORMATS`; docs/pretraining-data.md has examples.
_C.DATA.FORMAT = "coco"
# The annotation file; for "folder" the folder of texts; for "webdataset" tar shards: a pattern as
# shards/{00000..00099}.tar, a folder, a .txt list, or pipes as "pipe:curl -s URL/{0..9}.tar"; for
# "images", of which nothing is said, empty.
_C.DATA.TRAIN_CAPTIONS = ""
# The folder that the annotations' image paths are relative to.
_C.DATA.TRAIN_IMAGES = ""
# "karpathy": splits joined by "+"; "flickr": a text file of images' names, "" for all.
_C.DATA.TRAIN_SPLIT = ""
# Sources to mix: [weight, format, captions, images], and a split where it is not TRAIN_SPLIT. Not
# empty, they replace TRAIN_CAPTIONS and TRAIN_IMAGES, and FORMAT for training.
_C.DATA.TRAIN_SOURCES = []
# Empty, and for "images" also VAL_IMAGES: no validation.
_C.DATA.VAL_CAPTIONS = ""
_C.DATA.VAL_IMAGES = ""
_C.DATA.VAL_SPLIT = ""
# Empty: FORMAT.
_C.DATA.VAL_FORMAT = ""
# COCO instances files whose classes multilabel_classification learns; images are matched by name.
_C.DATA.TRAIN_LABELS = ""
_C.DATA.VAL_LABELS = ""
# Where indices of tar shards are kept. Empty: OUTPUT_DIR.
_C.DATA.INDEX_DIR = ""
# Word images, for methods that read them: paths of sets (told by their content: docs/seqclr.md), or
# [path, images' folder or list of a split]; behind a weight each, as [3, path], they are mixed.
_C.DATA.WORDS = []
_C.DATA.VAL_WORDS = []
# Height and width that a word is scaled to, in pixels, whatever its aspect ratio.
_C.DATA.WORD_SIZE = (32, 100)
# The share of each source's training images to use, and how many captions of each (0: all). Subsets
# of one SUBSET_SEED are nested, whatever SEED is.
_C.DATA.FRACTION = 1.0
_C.DATA.CAPTIONS_PER_IMAGE = 0
_C.DATA.SUBSET_SEED = 0
# Pipes are read by so many lanes in turn: a multiple of the number of processes, and the same for a
# run's whole life. No more than there are shards are used.
_C.DATA.STREAM_LANES = 64
# Encoded samples that each lane holds and shuffles.
_C.DATA.STREAM_BLOCK = 100
# A SentencePiece model. Empty: trained on the captions, as OUTPUT_DIR/tokenizer.model.
_C.DATA.TOKENIZER = ""
# Pieces of a tokenizer that is trained here; a given tokenizer brings its own number.
_C.DATA.VOCAB_SIZE = 10000
# A tokenizer that is trained here learns from captions without accents (NFKD, combining marks
# removed), as VirTex's do: for English alone. False: NFC, every letter is kept. A given tokenizer
# says itself which of both it needs.
_C.DATA.STRIP_ACCENTS = False
# The caption's column in a table, or its key in a shard's JSON. Empty: a known name; "caption".
_C.DATA.CAPTION_KEY = ""
# Crop side in pixels.
_C.DATA.IMAGE_SIZE = 224
# Random resized crop: range of the area kept (fraction) and of the aspect ratio.
_C.DATA.CROP_SCALE = (0.2, 1.0)
_C.DATA.CROP_RATIO = (0.75, 4.0 / 3.0)
# Probability of a horizontal flip, which also swaps the words left and right in the caption.
_C.DATA.FLIP_PROB = 0.5
# Brightness, contrast, saturation, hue, and the probability that any of it happens.
_C.DATA.COLOR_JITTER = (0.4, 0.4, 0.4, 0.1)
_C.DATA.COLOR_JITTER_PROB = 0.8
_C.DATA.NUM_WORKERS = 4
# The run stops when more than this fraction of the training images cannot be decoded, or of tar
# shards' samples cannot be used.
_C.DATA.MAX_SKIPPED_SHARE = 0.01

_C.SOLVER = CN()
# "sgd", "adamw" or "adadelta" (whose usual rate is 1).
_C.SOLVER.OPTIMIZER = "sgd"
# Peak learning rate of everything but the CNN, and of the CNN.
_C.SOLVER.BASE_LR = 1e-3
_C.SOLVER.CNN_LR = 0.2
# The last norm scales of the residual blocks are trained at so many times the CNN's rate.
_C.SOLVER.SCALE_LR_FACTOR = 1.0
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.BETAS = (0.9, 0.98)
_C.SOLVER.WEIGHT_DECAY = 1e-4
# Parameters whose full name matches this regular expression are not decayed.
_C.SOLVER.NO_DECAY = r".*textual\.(embedding|transformer).*(norm.*|bias)"
# Total images per iteration, over all processes.
_C.SOLVER.IMS_PER_BATCH = 256
# The images of an update come in so many passes, whose gradients are summed: as much less memory.
# Norms see those of a pass, as they see those of a process of as many more.
_C.SOLVER.ACCUMULATE = 1
# The number of processes that batch, learning rates and schedule are meant for: with another one
# they are scaled (docs/training.md). 0: they are as given.
_C.SOLVER.REFERENCE_WORLD_SIZE = 0
_C.SOLVER.MAX_ITER = 500000
_C.SOLVER.WARMUP_ITERS = 10000
# Maximum gradient norm over all parameters; 0 is no clipping.
_C.SOLVER.CLIP_GRAD_NORM = 10.0
# Iterations between checkpoints.
_C.SOLVER.CHECKPOINT_PERIOD = 2000
# Checkpoints are copied to the CPU's memory, which must have room for one more, and written from
# there while training goes on. False: training waits until they are on disk.
_C.SOLVER.CHECKPOINT_BACKGROUND = True
# How many of the last checkpoints stay (0: all; 1 leaves none to fall back to), and after how many
# iterations each the first checkpoint stays for good (0: none). model_final and model_best are
# never removed.
_C.SOLVER.CHECKPOINT_KEEP_LAST = 0
_C.SOLVER.CHECKPOINT_KEEP_EVERY = 0

# Lookahead (Zhang et al., arXiv 1907.08610): every STEPS updates the weights move ALPHA of the way.
_C.SOLVER.LOOKAHEAD = CN()
_C.SOLVER.LOOKAHEAD.ENABLED = True
_C.SOLVER.LOOKAHEAD.STEPS = 5
_C.SOLVER.LOOKAHEAD.ALPHA = 0.5

# Autocast. "bfloat16" works on CPUs and GPUs; "float16" needs a GPU and scales the loss.
_C.SOLVER.AMP = CN()
_C.SOLVER.AMP.ENABLED = True
_C.SOLVER.AMP.DTYPE = "bfloat16"

_C.TEST = CN()
# Iterations between validations; 0 validates at the end only.
_C.TEST.EVAL_PERIOD = 2000
_C.TEST.IMS_PER_BATCH = 256
# A validation result, e.g. "val/loss": the checkpoint at which it was lowest (a method's metric and
# "probe/mAP": highest) is kept as model_best.pth and backbone_best.safetensors. Empty: the last
# alone counts.
_C.TEST.BEST_METRIC = ""
# Validation images that are drawn into TensorBoard at each validation, if the method draws any:
# captioners do, with greedy captions.
_C.TEST.NUM_CAPTIONS = 8
# A VOC folder: linear SVMs on the backbone's features of its images, as tools/linear_probe.py has
# them (docs/probes.md), each PERIOD iterations (0: at the end only). Empty: none.
_C.TEST.PROBE = CN()
_C.TEST.PROBE.ROOT = ""
_C.TEST.PROBE.TRAIN = "trainval"
_C.TEST.PROBE.TEST = "test"
# The classes to judge. Empty: VOC's twenty.
_C.TEST.PROBE.CLASSES = []
_C.TEST.PROBE.PERIOD = 0
# Pixels: the shorter side is scaled to RESIZE, then the central CROP x CROP is taken.
_C.TEST.PROBE.RESIZE = 256
_C.TEST.PROBE.CROP = 224

# Iterations between log lines.
_C.LOG_PERIOD = 20

# Words of MODEL.OBJECTIVE whose methods add keys of their own; the others' are all above.
WITH_OWN_KEYS = ("seqclr", "word_recognition", "ipt")

# What may differ between a run's parts: where things are, and what is watched how often. All other
# keys change the weights that the run ends with.
MAY_CHANGE = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "CUDNN_BENCHMARK",
    "TEST.*",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VISUAL.RECOMPUTE",
    "VIRTEX.*",
    "DATA.TRAIN_CAPTIONS",
    "DATA.TRAIN_IMAGES",
    "DATA.TRAIN_LABELS",
    "DATA.TRAIN_SOURCES",
    "DATA.WORDS",
    "DATA.FORMAT",
    "DATA.VAL_*",
    "EVAL.*",
    "DATA.TOKENIZER",
    "DATA.VOCAB_SIZE",
    "DATA.INDEX_DIR",
    "DATA.NUM_WORKERS",
    "DATA.MAX_SKIPPED_SHARE",
    "SOLVER.CHECKPOINT_*",
    "IPT.RAIN_STREAKS",
    "SOLVER.ACCUMULATE",
)


def get_pretrain_cfg() -> CN:
    """A fresh, unfrozen copy of the defaults above."""
    return _C.clone()


def load_pretrain_config(config_file: str | None, opts: Sequence[str], expand: bool = True) -> CN:
    """Merge a file and KEY VALUE pairs into the defaults and those of the method.

    Args:
        config_file, opts, expand: as of `engine.config.load_config`.
    """
    seen = get_pretrain_cfg()
    seen.set_new_allowed(True)  # of a method whose keys are not known yet
    pairs = list(zip(opts[::2], opts[1::2]))
    named = [part for pair in pairs if pair[0] == "MODEL.OBJECTIVE" for part in pair]
    objective = load_config(seen, config_file, named, expand=False).MODEL.OBJECTIVE
    cfg = get_pretrain_cfg()
    if ":" in objective or objective in WITH_OWN_KEYS:
        from pretrain.methods.method import import_method  # which imports torch

        import_method(objective).add_config(cfg)
    return load_config(cfg, config_file, opts, expand=expand)
