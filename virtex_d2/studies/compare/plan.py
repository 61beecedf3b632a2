"""Which runs a comparison has: every config, fraction of the labels, initialisation and seed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from virtex_d2.checkpoint.source import local_path, read_backbone
from virtex_d2.checkpoint.starts import RANDOM, STARTS, ZERO_SCALES, is_random
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.studies.compare.runs import FROZEN, SET_BY_PLAN, SVM, Cell, percent
from virtex_d2.studies.probes.config import check_config, get_probe_cfg
from virtex_d2.studies.stages import Stage, read_config

MOST_INITS = 8  # as many colours as are told apart

# What is done with each start, for people.
STEPS = {SVM: "SVMs on features", FROZEN: "frozen backbone", "": "fine-tuning"}
PRESETS = {"quick": (SVM, FROZEN, "")}  # cheap questions first
PRESET_SEEDS = (1, 2, 3, 4, 5)  # with three, only differences of three deviations are seen
PROBED = ("res3", "res4", "res5")

_FROZEN_OPTIONS = ("MODEL.BACKBONE.FREEZE_AT", "5", "SOLVER.BACKBONE_LR_FACTOR", "1.0")
# Keys that a detector's and a probe's config share.
_SHARED = (
    *("MODEL.DEVICE", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "VIRTEX.DATASETS"),
    *(f"MODEL.RESNETS.{key}" for key in ("DEPTH", "RES2_OUT_CHANNELS", "NUM_GROUPS")),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.RESNETS.STRIDE_IN_1X1"),
    *(f"VIRTEX.{key}" for key in ("LAYOUT", "COPY", "PREFIX")),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_SEED = "{seed}"


@dataclass(frozen=True)
class Init:
    """A start of the detectors.

    Attributes:
        name: for people, tables and folders.
        weights: a checkpoint that the adapter reads, or a name of `STARTS`; "" is random. `{seed}`
            in it stands for the seed of the detector: each then starts from a pretraining of its
            own.
        overrides: ("KEY", "VALUE", ...) for this start alone.
    """

    name: str
    weights: str = ""
    overrides: tuple[str, ...] = ()

    def weights_for(self, seed: int) -> str:
        """The checkpoint's path for one seed."""
        return self.weights.replace(_SEED, str(seed))


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        configs: config files by the name under which they are shown.
        inits: the first is the baseline that the others are compared with.
        fractions: of the training images, each in (0, 1]; by config's name.
        seeds: one run of each start for every seed.
        overrides: ("KEY", "VALUE", ...) for all runs.
        num_gpus: of one run.
        steps: what is done with each start, in order: "" trains the whole detector, `FROZEN` its
            heads on a frozen backbone, `SVM` asks linear classifiers on the backbone's features
            which classes are in an image.
    """

    configs: Mapping[str, str]
    inits: tuple[Init, ...]
    fractions: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (1,)
    overrides: tuple[str, ...] = ()
    num_gpus: int = 1
    steps: tuple[str, ...] = ("",)

    @property
    def baseline(self) -> str:
        """The name of the start that the others are compared with."""
        return self.inits[0].name

    @property
    def cells(self) -> list[Cell]:
        """Every run's place, in their order."""
        return [
            Cell(config, part, init.name, seed, step)
            for step in self.steps
            for config in self.configs
            for part in self.fractions[config]
            for seed in self.seeds
            for init in self.inits
            # scales of 0 in frozen norms would stay 0
            if (step, init.weights) != (FROZEN, ZERO_SCALES)
        ]

    def stages(self, root: Path, output: Path) -> list[Stage]:
        """Make a stage of every run, each step's of one group: they may run at the same time.

        Args:
            root: the project's folder.
            output: the comparison's.
        """
        return [self._stage(cell, root, output / "runs" / cell.folder) for cell in self.cells]

    def _stage(self, cell: Cell, root: Path, folder: Path) -> Stage:
        place = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        init = next(init for init in self.inits if init.name == cell.init)
        weights, config = init.weights_for(cell.seed), self.configs[cell.config]
        gpus = ("--num-gpus", str(self.num_gpus)) if self.num_gpus > 1 else ()
        if cell.step == SVM:
            cache = str(Path(place).parents[len(Path(cell.folder).parts)] / "features")
            command = ("tools/linear_probe.py", *gpus, "DATA.CACHE_DIR", cache)
            rest = self.probe_options(root, cell.config, init)
            weights = weights or RANDOM
        else:
            command = ("tools/train_net.py", "--config-file", config, *gpus)
            frozen = _FROZEN_OPTIONS if cell.step == FROZEN else ()
            rest = (*self.overrides, *init.overrides, *frozen)
        step = f" ({STEPS[cell.step]})" if cell.step else ""
        return Stage(
            name=cell.name,
            title=f"{cell.config}, {percent(cell.fraction)} % of the images{step}: {init.name}, "
            f"seed {cell.seed}",
            command=(
                *command,
                *("OUTPUT_DIR", place, "SEED", str(cell.seed), "MODEL.WEIGHTS", weights),
                # Other seeds take other images: which ones belongs to what a fraction leaves open.
                *("VIRTEX.FRACTION", repr(cell.fraction), "VIRTEX.FRACTION_SEED", str(cell.seed)),
                *rest,
            ),
            folder=place,
            configs=(config,),
            files=() if is_random(weights) else (local_path(weights),),
            label=cell.name,
            group=cell.step or "runs",
        )

    def probe_options(self, root: Path, config: str, init: Init) -> tuple[str, ...]:
        """Say in keys of `tools/linear_probe.py` what a detector's config and a start say.

        The same data sets, preprocessing and network; images are as large as the detector's in its
        test, at most the recipe's 256 px, of which it sees the central 7/8 (Goyal et al., arXiv
        1905.01235: 224 of 256).
        """
        cfg = self.detector_config(root, config, init)
        side = min(256, cfg.INPUT.MIN_SIZE_TEST)
        options = {
            "TASK": "voc_svm",
            "DATA.FORMAT": "detection",
            "DATA.TRAIN": ",".join(cfg.DATASETS.TRAIN),
            "DATA.TEST": ",".join(cfg.DATASETS.TEST),
            "DATA.NUM_WORKERS": cfg.DATALOADER.NUM_WORKERS,
            "INPUT.RESIZE": side,
            "INPUT.CROP": side * 7 // 8,
            "MODEL.RESNETS.OUT_FEATURES": list(PROBED),
        }
        for key in _SHARED:
            value: Any = cfg
            for part in key.split("."):
                value = value[part]
            options[key] = value
        return tuple(str(word) for pair in options.items() for word in pair)

    def detector_config(self, root: Path, config: str, init: Init) -> CfgNode:
        """Read the config of a start's detectors, without what the plan sets of each run."""
        cfg = get_virtex_cfg()
        load_config(cfg, str(root / self.configs[config]), self.overrides, "--opts")
        return load_config(cfg, None, init.overrides, f"--init-opts {init.name}")


def parse_inits(texts: Sequence[str], overrides: Sequence[Sequence[str]] = ()) -> tuple[Init, ...]:
    """The starts of a command line.

    Args:
        texts: a name of `STARTS`, or "NAME=CHECKPOINT".
        overrides: [NAME, KEY, VALUE, ...] of single starts.
    """
    inits: dict[str, Init] = {}
    for text in texts:
        name, equals, weights = text.partition("=")
        if not _NAME.fullmatch(name) or (equals and not weights):
            raise InputError(
                f"--init {text!r}: expected {', '.join(STARTS)} or NAME=CHECKPOINT, such as "
                "virtex=output/pretrain/backbone.safetensors; names have letters, digits and _.+-."
            )
        if not equals and name not in STARTS:
            checkpoint = "output/pretrain/backbone.safetensors"
            example = f"{Path(text).stem}={text}" if Path(text).suffix else f"{text}={checkpoint}"
            raise InputError(
                f"--init {text!r}: expected NAME=CHECKPOINT; only {' and '.join(STARTS)} stand "
                f"alone. For example: --init {example}."
            )
        if equals and (name in STARTS or weights in STARTS):
            start = name if name in STARTS else weights
            advice = "choose another name" if name in STARTS else f"write --init {start}"
            raise InputError(f"--init {text!r}: {start} has no checkpoint; {advice}.")
        if name in inits:
            raise InputError(f"--init {text!r}: there are two of the name {name!r}; rename one.")
        inits[name] = Init(name, name if name == ZERO_SCALES else weights)
    if not 2 <= len(inits) <= MOST_INITS:
        raise InputError(
            f"--init: expected 2 to {MOST_INITS} initialisations to compare, found {len(inits)}."
        )
    for name, *pairs in overrides:
        if name not in inits:
            raise InputError(f"--init-opts {name}: no --init has this name.{nearest(name, inits)}")
        checked = (*inits[name].overrides, *_checked_overrides(f"--init-opts {name}", pairs))
        inits[name] = Init(name, inits[name].weights, checked)
    return tuple(inits.values())


def choose_baseline(names: Sequence[str], given: str) -> str:
    """The start that others are compared with: what is given, else random, else the first."""
    baseline = given or (RANDOM if RANDOM in names else names[0])
    if baseline not in names:
        raise InputError(
            f"--baseline {baseline}: no initialisation has this name.{nearest(baseline, names)}"
        )
    return baseline


def make_plan(
    configs: Sequence[str],
    inits: tuple[Init, ...],
    fractions: Sequence[float] = (),
    seeds: Sequence[int] = (1,),
    overrides: Sequence[str] = (),
    baseline: str = "",
    num_gpus: int = 1,
    root: Path = Path(),
    preset: str = "",
) -> Plan:
    """A plan whose arguments hold.

    Args:
        configs: paths of config files of `tools/train_net.py`.
        inits: of `parse_inits`.
        fractions: for all configs; none: VIRTEX.FRACTION of each.
        seeds, overrides, num_gpus: as in `Plan`.
        baseline: a start's name; "": random where it is one of them, else the first.
        root: where relative paths of configs begin.
        preset: of `PRESETS`; "": the whole detectors alone.
    """
    baseline = choose_baseline([init.name for init in inits], baseline)
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"--fractions {fraction}: expected numbers above 0, at most 1.")
    if any(seed < 0 for seed in seeds):
        raise InputError(
            "--seeds: expected numbers that are not negative: a drawn seed pairs none."
        )
    if not seeds:
        raise InputError("--seeds: none is given.")
    for flag, values in (("--fractions", fractions), ("--seeds", seeds)):
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{flag}: {twice[0]} is there twice.")
    if num_gpus < 1:
        raise InputError(f"--num-gpus {num_gpus}: expected at least 1.")
    by_name = {Path(config).stem: config for config in configs}
    if len(by_name) < len(configs):
        raise InputError(
            f"--config-file: two of {', '.join(configs)} have the same name; rename or leave out "
            "one: runs and tables go by it."
        )
    descending = tuple(sorted(fractions, reverse=True))
    return Plan(
        by_name,
        tuple(sorted(inits, key=lambda init: init.name != baseline)),
        {name: descending or (_own_fraction(root / path),) for name, path in by_name.items()},
        tuple(seeds),
        _checked_overrides("--opts", overrides),
        num_gpus,
        PRESETS[preset] if preset else ("",),
    )


def check_plan(plan: Plan, root: Path) -> None:
    """Read every config and checkpoint once, so that no day of training ends at the last one."""
    for config in plan.configs:
        for init in plan.inits:
            plan.detector_config(root, config, init)
            if SVM in plan.steps:
                words = plan.probe_options(root, config, init)
                check_config(load_config(get_probe_cfg(), None, words))
    for init in plan.inits:
        options = dict(zip(init.overrides[::2], init.overrides[1::2]))
        for weights in dict.fromkeys(init.weights_for(seed) for seed in plan.seeds):
            if not is_random(weights):
                keys = ("VIRTEX.LAYOUT", "VIRTEX.COPY", "VIRTEX.PREFIX")
                read_backbone(local_path(weights), *(options.get(key, "") for key in keys))


def _own_fraction(config: Path) -> float:
    return float(read_config(config).get("VIRTEX", {}).get("FRACTION", 1.0))


def _checked_overrides(where: str, opts: Sequence[str]) -> tuple[str, ...]:
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise InputError(
            f"{flags[0]} stands behind {where}, whose KEY VALUE pairs go to the end of the line. "
            f"Put it before {where}."
        )
    if len(opts) % 2:
        raise InputError(f"{where}: expected KEY VALUE pairs, found {' '.join(opts)}.")
    for key in opts[::2]:
        if key in SET_BY_PLAN:
            raise InputError(f"{where}: {key} is set by the comparison itself; leave it out.")
        if key.startswith("-"):
            raise InputError(f"{where}: {key} stands where a config key was expected.")
    return tuple(opts)
