"""Which runs a comparison has: every config, fraction of the labels, initialisation and seed."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virtex_d2.checkpoint.source import local_path, read_backbone
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.studies.pipeline.stage import Stage, read_config

RANDOM = "random"  # the initialisation without weights
MOST_INITS = 8  # as many colours as are told apart

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_SEED = "{seed}"
# What the plan sets itself, so that neither config overrides nor an initialisation's may.
_OURS = ("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "VIRTEX.FRACTION", "VIRTEX.FRACTION_SEED")


@dataclass(frozen=True)
class Init:
    """A start of the detectors.

    Attributes:
        name: for people, tables and folders.
        weights: a checkpoint that the adapter reads; "" for random weights. `{seed}` in it stands
            for the seed of the detector: each then starts from a pretraining of its own.
        overrides: ("KEY", "VALUE", ...) for this start alone.
    """

    name: str
    weights: str = ""
    overrides: tuple[str, ...] = ()

    def weights_for(self, seed: int) -> str:
        """The checkpoint's path for one seed."""
        return self.weights.replace(_SEED, str(seed))


@dataclass(frozen=True, order=True)
class Cell:
    """One run's place in the comparison.

    Attributes:
        config: the config file's name without its suffix.
        fraction: of the training images, in (0, 1].
        init: its name.
        seed: of weights that are not loaded, order and augmentation, and of the fraction's images.
    """

    config: str
    fraction: float
    init: str
    seed: int

    @property
    def name(self) -> str:
        """For files: "mask_rcnn_R_50_FPN-10pct-random-seed1"."""
        return f"{self.config}-{percent(self.fraction)}pct-{self.init}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Of the run, below the comparison's runs."""
        part = f"{percent(self.fraction)}pct"
        return f"{self.config}/{part}/{self.init}/seed{self.seed}"


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
    """

    configs: Mapping[str, str]
    inits: tuple[Init, ...]
    fractions: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (1,)
    overrides: tuple[str, ...] = ()
    num_gpus: int = 1
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        cells = tuple(
            Cell(config, part, init.name, seed)
            for config in self.configs
            for part, seed, init in itertools.product(
                self.fractions[config], self.seeds, self.inits
            )
        )
        object.__setattr__(self, "cells", cells)

    @property
    def baseline(self) -> str:
        """The name of the start that the others are compared with."""
        return self.inits[0].name

    def stages(self, root: Path, output: Path) -> list[Stage]:
        """One stage a run, all of one group: they may run at the same time.

        Args:
            root: the project's folder.
            output: the comparison's.
        """
        inits = {init.name: init for init in self.inits}
        configs = {name: read_config(root / path) for name, path in self.configs.items()}
        return [
            _stage(
                *(self, cell, inits[cell.init], configs[cell.config]),
                *(root, output / "runs" / cell.folder),
            )
            for cell in self.cells
        ]


def parse_inits(texts: Sequence[str], overrides: Sequence[Sequence[str]] = ()) -> tuple[Init, ...]:
    """The starts of a command line.

    Args:
        texts: "random", or "NAME=CHECKPOINT".
        overrides: [NAME, KEY, VALUE, ...] of single starts.
    """
    inits: dict[str, Init] = {}
    for text in texts:
        name, equals, weights = text.partition("=")
        if not _NAME.fullmatch(name) or (equals and not weights):
            raise InputError(
                f"--init {text!r}: expected {RANDOM} or NAME=CHECKPOINT, such as "
                "virtex=output/pretrain/backbone.safetensors; names have letters, digits and _.+-."
            )
        if not equals and name != RANDOM:
            checkpoint = "output/pretrain/backbone.safetensors"
            example = f"{Path(text).stem}={text}" if Path(text).suffix else f"{text}={checkpoint}"
            raise InputError(
                f"--init {text!r}: expected NAME=CHECKPOINT; only {RANDOM} stands alone. For "
                f"example: --init {example}."
            )
        if equals and name == RANDOM:
            raise InputError(f"--init {text!r}: {RANDOM} has no checkpoint; choose another name.")
        if name in inits:
            raise InputError(f"--init {text!r}: there are two of the name {name!r}; rename one.")
        inits[name] = Init(name, weights)
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
) -> Plan:
    """A plan whose arguments hold.

    Args:
        configs: paths of config files of `tools/train_net.py`.
        inits: of `parse_inits`.
        fractions: for all configs; none: VIRTEX.FRACTION of each.
        seeds, overrides, num_gpus: as in `Plan`.
        baseline: a start's name; "": random where it is one of them, else the first.
        root: where relative paths of configs begin.
    """
    names = {init.name: init for init in inits}
    baseline = choose_baseline(list(names), baseline)
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"--fractions {fraction}: expected numbers above 0, at most 1.")
    if any(seed < 0 for seed in seeds):
        raise InputError(
            "--seeds: expected numbers that are not negative: a drawn seed pairs none."
        )
    if fractions:
        _check_distinct("--fractions", fractions)
    _check_distinct("--seeds", seeds)
    if num_gpus < 1:
        raise InputError(f"--num-gpus {num_gpus}: expected at least 1.")
    by_name = {Path(config).stem: config for config in configs}
    if len(by_name) < len(configs):
        raise InputError(
            f"--config-file: two of {', '.join(configs)} have the same name; rename or leave out "
            "one: runs and tables go by it."
        )
    ordered = (names[baseline], *(init for init in inits if init.name != baseline))
    return Plan(
        by_name,
        ordered,
        {
            name: tuple(sorted(fractions, reverse=True)) or (_own_fraction(root / config),)
            for name, config in by_name.items()
        },
        tuple(seeds),
        _checked_overrides("--opts", overrides),
        num_gpus,
    )


def check_plan(plan: Plan, root: Path) -> None:
    """Read every config and checkpoint once, so that no day of training ends at the last one."""
    for config in plan.configs.values():
        for init in plan.inits:
            cfg = load_config(get_virtex_cfg(), str(root / config), plan.overrides, "--opts")
            load_config(cfg, None, init.overrides, f"--init-opts {init.name}")
    for init in plan.inits:
        options = dict(zip(init.overrides[::2], init.overrides[1::2]))
        for weights in dict.fromkeys(init.weights_for(seed) for seed in plan.seeds):
            if weights:
                keys = ("VIRTEX.LAYOUT", "VIRTEX.COPY", "VIRTEX.PREFIX")
                read_backbone(local_path(weights), *(options.get(key, "") for key in keys))


def _own_fraction(config: Path) -> float:
    return float(read_config(config).get("VIRTEX", {}).get("FRACTION", 1.0))


def percent(fraction: float) -> str:
    """0.1 -> "10", 0.005 -> "0.5"."""
    return f"{100 * fraction:.6g}"


def _stage(plan: Plan, cell: Cell, init: Init, content: Mapping, root: Path, folder: Path) -> Stage:
    """The run of a cell; `content` is that of its config file."""
    place = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
    weights = init.weights_for(cell.seed)
    config = plan.configs[cell.config]
    iterations = _number(content, plan.overrides + init.overrides)
    return Stage(
        name=cell.name,
        title=f"{cell.config}, {percent(cell.fraction)} % of the images: {init.name}, "
        f"seed {cell.seed}",
        command=(
            *("tools/train_net.py", "--config-file", config),
            *(("--num-gpus", str(plan.num_gpus)) if plan.num_gpus > 1 else ()),
            *("OUTPUT_DIR", place, "SEED", str(cell.seed), "MODEL.WEIGHTS", weights),
            # Other seeds take other images: which ones belongs to what a fraction leaves open.
            *("VIRTEX.FRACTION", repr(cell.fraction), "VIRTEX.FRACTION_SEED", str(cell.seed)),
            *plan.overrides,
            *init.overrides,
        ),
        folder=place,
        configs=(config,),
        files=(local_path(weights),) if weights else (),
        iterations=iterations,
        label=cell.name,
        group="runs",
    )


def _number(config: Mapping, overrides: Sequence[str]) -> int:
    """SOLVER.MAX_ITER for the progress line; 0 where only detectron2's default says it."""
    found = dict(zip(overrides[::2], overrides[1::2])).get("SOLVER.MAX_ITER")
    found = found if found is not None else config.get("SOLVER", {}).get("MAX_ITER", 0)
    return int(found) if str(found).isdigit() else 0


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
        if key in _OURS:
            raise InputError(f"{where}: {key} is set by the comparison itself; leave it out.")
        if key.startswith("-"):
            raise InputError(f"{where}: {key} stands where a config key was expected.")
    return tuple(opts)


def _check_distinct(what: str, values: Iterable[float]) -> None:
    values = list(values)
    twice = [value for value in values if values.count(value) > 1]
    if not values or twice:
        raise InputError(
            f"{what}: {twice[0]} is there twice." if twice else f"{what}: none is given."
        )
