"""The arms of benchmarks/photographs.py, what its runs are for, and their sizes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from virtex_d2.checkpoint.starts import STARTS
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.runs import percent

Options = Mapping[str, str]  # keys of a config with their values

# The arm that the choosing has settled on, by docs/recipe.md. "": not yet, and nothing is judged.
RECIPE = ""

# --- arms


@dataclass(frozen=True)
class Arm:
    """A way to start a network.

    Attributes:
        base: the arm that it is compared with, seed by seed.
        phases: options of pretrainings that follow each other, of equally many iterations each. The
            next goes on from the whole model where the task stays, else from the ResNet. Empty: the
            start of this name, untrained.
        fraction, captions: of the data: share of the images, captions of each (0: all).
        line: the curve against images that it is a point of.
    """

    base: str = ""
    phases: tuple[Options, ...] = ()
    fraction: float = 1.0
    captions: int = 0
    line: str = ""


def _scale(start: float) -> Options:
    return {"MODEL.VISUAL.ZERO_INIT_RESIDUAL": "False", "MODEL.VISUAL.RESIDUAL_SCALE": f"{start:g}"}


def _rate(factor: float) -> Options:
    return {"SOLVER.SCALE_LR_FACTOR": f"{factor:g}"}


TOKENS = {"MODEL.OBJECTIVE": "token_classification"}
CAPTIONS = {"MODEL.OBJECTIVE": "bicaptioning"}

# In the order in which they are run: what decides most comes first.
ARMS = {
    "random": Arm(),
    "random_zero_scales": Arm("random"),
    "tokens": Arm("bicaptioning", (TOKENS,)),
    "tokens_scale_0.2": Arm("tokens", ({**TOKENS, **_scale(0.2)},)),
    "tokens_scale_1": Arm("tokens", ({**TOKENS, **_scale(1)},)),
    "tokens_rate_10": Arm("tokens", ({**TOKENS, **_rate(10)},)),
    "bicaptioning": Arm("random_zero_scales", (CAPTIONS,)),
    "bicaptioning_rate_10": Arm("bicaptioning", ({**CAPTIONS, **_rate(10)},)),
    "tokens_crops_0.2": Arm("tokens", ({**TOKENS, "DATA.CROP_SCALE": "(0.2, 1.0)"},)),
    "tokens_no_jitter": Arm("tokens", ({**TOKENS, "DATA.COLOR_JITTER_PROB": "0.0"},)),
    "tokens_64_112px": Arm("tokens", ({**TOKENS, "DATA.IMAGE_SIZE": "64"}, TOKENS)),
    "tokens_bicaptioning": Arm("tokens", (TOKENS, CAPTIONS)),
    "bicaptioning_and_tokens": Arm(
        "tokens", ({**CAPTIONS, "MODEL.CAPTIONING.CLASSIFICATION_WEIGHT": "1.0"},)
    ),
    "tokens_scale_0.5": Arm("tokens", ({**TOKENS, **_scale(0.5)},)),
    "tokens_rate_3": Arm("tokens", ({**TOKENS, **_rate(3)},)),
    "tokens_rate_30": Arm("tokens", ({**TOKENS, **_rate(30)},)),
    "bicaptioning_scale_0.2": Arm("bicaptioning", ({**CAPTIONS, **_scale(0.2)},)),
    "bicaptioning_scale_0.5": Arm("bicaptioning", ({**CAPTIONS, **_scale(0.5)},)),
    "bicaptioning_scale_1": Arm("bicaptioning", ({**CAPTIONS, **_scale(1)},)),
    "bicaptioning_rate_3": Arm("bicaptioning", ({**CAPTIONS, **_rate(3)},)),
    "bicaptioning_rate_30": Arm("bicaptioning", ({**CAPTIONS, **_rate(30)},)),
}
FRACTIONS = (0.1, 0.2, 0.5, 1.0)  # of the paper's data efficiency
CAPTIONS_PER_IMAGE = (1, 0)


@dataclass(frozen=True)
class Purpose:
    """What runs are for.

    Attributes:
        seeds: the only ones that it may use.
        iterations: of a pretraining, by default.
        arms: by name.
        split: the VOC lists that SVMs are fitted and read on.
        bases: arms that all are compared with; "" is each arm's own.
    """

    seeds: tuple[int, ...]
    iterations: tuple[int, ...]
    arms: Mapping[str, Arm]
    split: tuple[str, str] = ("trainval", "test")
    bases: tuple[str, ...] = ("",)


def find_purpose(name: str) -> Purpose:
    """Give "choose", "judge" or "efficiency"."""
    if name == "choose":
        return Purpose((1, 2, 3), (500,), ARMS, ("fit", "read"))
    if RECIPE not in ARMS:
        raise InputError(
            f"{name}: reads VOC's `test`, and RECIPE in {__file__} is {RECIPE!r}: it "
            "must name the arm that was chosen. Choose first, and write it down in docs/recipe.md."
        )
    if name == "judge":
        names = dict.fromkeys((*STARTS, "bicaptioning", "tokens", RECIPE))
        return Purpose(
            tuple(range(11, 19)),
            (500, 1500),
            {name: ARMS[name] for name in names},
            bases=("bicaptioning", *STARTS),
        )
    arms = {name: ARMS[name] for name in STARTS}
    for name, captions, fraction in itertools.product(
        dict.fromkeys((RECIPE, "bicaptioning")), CAPTIONS_PER_IMAGE, FRACTIONS
    ):
        own = f"{name}-{captions or 'all'}-captions-{percent(fraction)}pct"
        line = f"{name}, {'1 caption' if captions else 'all captions'}"
        arms[own] = Arm("random_zero_scales", ARMS[name].phases, fraction, captions, line)
    return Purpose((1, 2, 3), (1500,), arms)


# --- sizes


@dataclass(frozen=True)
class Preset:
    """How large everything is: a pretraining's config and options, and those of the SVMs."""

    config: str = "configs/pretrain/small_R_50.yaml"
    pretrain: Options = field(default_factory=dict)
    probe: Options = field(default_factory=dict)


PRESETS = {
    "small": Preset(
        pretrain={"MODEL.VISUAL.NAME": "resnet18", "DATA.IMAGE_SIZE": "112"},
        probe={"INPUT.RESIZE": "128", "INPUT.CROP": "112", "DATA.NUM_WORKERS": "1"},
    ),
    "gpu": Preset(
        pretrain={
            "DATA.IMAGE_SIZE": "128",
            "DATA.NUM_WORKERS": "12",
            "SOLVER.IMS_PER_BATCH": "256",
        },
        probe={"INPUT.RESIZE": "144", "INPUT.CROP": "128"},
    ),
    "paper": Preset("configs/pretrain/bicaptioning_R_50_L1_H1024.yaml"),  # COCO, 224 px
}
PROBE_CONFIG = "configs/probes/voc07_svm.yaml"
PERSON_CONFIG = "configs/coco/mask_rcnn_R_50_FPN_person_small.yaml"
VOC_CONFIG = "configs/voc/faster_rcnn_R_50_FPN_five_classes_small.yaml"
# What judges a backbone: a config, and options behind those of the preset.
MEASURES: Mapping[str, tuple[str, Options]] = {
    "svm": (PROBE_CONFIG, {}),
    "person": (PERSON_CONFIG, {}),
    "voc": (VOC_CONFIG, {"TEST.EVAL_PERIOD": "300"}),  # its test images take minutes
}
