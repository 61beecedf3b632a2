"""Finished runs: a folder -> config, curves, results and costs."""

import glob
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json
from virtex_d2.engine.identity import flat
from virtex_d2.studies.curves import Metrics, area
from virtex_d2.studies.stages import read_config

TASKS = {"bbox": "Box", "segm": "Mask"}
# Averages over all classes; NaN of these means that nothing was detected at all.
AVERAGES = ("AP", "AP50", "AP75")
SVM, FROZEN = "svm", "frozen"  # steps before the whole detector is trained
AREA = "area"  # a result's name: AP averaged over the run, see `curves.area`
_RESULT = re.compile(r"(?:(?P<data>[^/]+)/)?(?P<task>bbox|segm)(?P<kind>_\w+)?/(?P<name>.+)")
_PROCESSES = re.compile(r"Process 0 of (\d+);")
# What a comparison sets itself for each run, so that starts differ in it, or the place.
SET_BY_PLAN = ("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "VIRTEX.FRACTION", "VIRTEX.FRACTION_SEED")


@dataclass(frozen=True, order=True)
class Cell:
    """One run's place in the comparison.

    Attributes:
        config: the config file's name without its suffix.
        fraction: of the training images, in (0, 1].
        init: its name.
        seed: of weights that are not loaded, order and augmentation, and of the fraction's images.
        step: of the preset that asks cheap questions first: `SVM`, `FROZEN`, or "" where the whole
            detector is trained.
    """

    config: str
    fraction: float
    init: str
    seed: int
    step: str = ""

    @property
    def name(self) -> str:
        """For files: "mask_rcnn_R_50_FPN-10pct-random-seed1"."""
        begin = f"{self.config}-{self.step}" if self.step else self.config
        return f"{begin}-{percent(self.fraction)}pct-{self.init}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Of the run, below the comparison's runs."""
        part = f"{percent(self.fraction)}pct"
        return "/".join(filter(None, (self.config, part, self.step, self.init, f"seed{self.seed}")))


@dataclass(frozen=True, order=True)
class Metric:
    """A result's name, as the evaluators write it ("coco_2017_val/bbox/AP-person") in parts.

    Attributes:
        data: the test set, where a run has several; else "".
        task: "bbox" or "segm".
        kind: "" or what the evaluation was with, such as "_TTA".
        name: "AP", "AP50", "APs", "AP-person", ...
    """

    data: str
    task: str
    kind: str
    name: str

    @classmethod
    def parse(cls, key: str) -> "Metric | None":
        """None for what is not a result."""
        found = _RESULT.fullmatch(key)
        return (
            cls(**{name: text or "" for name, text in found.groupdict().items()}) if found else None
        )

    @property
    def key(self) -> str:
        """As in metrics.json."""
        return f"{self.data}{'/' if self.data else ''}{self.task}{self.kind}/{self.name}"

    @property
    def label(self) -> str:
        """For people: "Box AP50"."""
        kind = f" {self.kind[1:]}" if self.kind else ""
        data = f"{self.data}: " if self.data else ""
        name = "AP over the run" if self.name == AREA else self.name
        return f"{data}{TASKS[self.task]} {name}{kind}"

    @property
    def class_name(self) -> str:
        """Of a result of one class; else ""."""
        return self.name[3:] if self.name.startswith("AP-") else ""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        cell: its place in the comparison.
        folder: its OUTPUT_DIR.
        config: its config.yaml, as nested dicts.
        results: of its last evaluation, percent, and `AREA` of all of them. NaN: nothing to
            measure, as of an absent class.
        curves: by metric, the results against iterations: {iteration: percent}.
        hours: of training, evaluations not counted.
        processes: that trained together; None where the log does not say it.
    """

    cell: Cell
    folder: Path
    config: Mapping[str, Any]
    results: Mapping[Metric, float]
    curves: Mapping[Metric, Mapping[int, float]]
    hours: float
    processes: int | None

    @property
    def device(self) -> str:
        """MODEL.DEVICE as it was resolved: "cuda", "cpu"."""
        return str(self.config.get("MODEL", {}).get("DEVICE", "unknown"))

    @property
    def iterations(self) -> int:
        """SOLVER.MAX_ITER."""
        return int(self.config["SOLVER"]["MAX_ITER"])

    @property
    def cost(self) -> float:
        """Hours of all processes together."""
        return self.hours * (self.processes or 1)


def read_run(cell: Cell, folder: Path) -> Run:
    """Read a run that has come to its end."""
    config = read_run_config(folder)
    _check_cell(cell, folder, config)
    length = config["SOLVER"]["MAX_ITER"]
    metrics = Metrics(folder / "metrics.json", length)
    curves = {}
    for key in metrics.keys:
        if metric := Metric.parse(key):
            nothing = 0.0 if metric.name in AVERAGES else math.nan
            curves[metric] = {
                iteration: nothing if math.isnan(value) else value
                for iteration, value in metrics.curve(key).items()
            }
    done = max((max(curve) for curve in curves.values() if curve), default=0)
    if done < length:
        raise InputError(
            f"{metrics.path}: expected an evaluation after the last iteration ({length}), found "
            f"{f'the last one after {done}' if done else 'none'}. The run has not come to its end: "
            "continue it with --resume."
        )
    results = {metric: curve[length] for metric, curve in curves.items() if length in curve}
    for metric in [metric for metric in results if metric.name == "AP"]:
        results[replace(metric, name=AREA)] = area(curves[metric])
    return Run(
        cell,
        folder,
        config,
        results,
        curves,
        metrics.training_seconds / 3600,
        _processes(folder),
    )


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's config.yaml."""
    path = folder / "config.yaml"
    config = read_config(path)
    length = config.get("SOLVER", {}).get("MAX_ITER")
    if not isinstance(length, int) or "ROI_HEADS" not in config.get("MODEL", {}):
        raise InputError(
            f"{path}: expected the config of a detector's run, as train_net writes it."
        )
    return config


def read_probe(folder: Path) -> dict[str, float]:
    """Read what the SVMs of a finished `SVM` step found: mAP in percent by the features' name."""
    metrics = read_json(folder / "results.json")["metrics"]
    return {name[: -len("/mAP")]: value for name, value in metrics.items() if name.endswith("/mAP")}


def config_differences(runs: Iterable[Run]) -> dict[str, dict[str, str]]:
    """Keys in which the runs of different starts differ beyond what makes them different starts.

    Returns:
        Key -> {start's name: its value, or values}.
    """
    runs = list(runs)
    inits = dict.fromkeys(run.cell.init for run in runs)
    by_key: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for key, value in flat(run.config):
            by_key.setdefault(key, {}).setdefault(run.cell.init, set()).add(repr(value))
    return {
        key: {init: ", ".join(sorted(values.get(init, {"absent"}))) for init in inits}
        for key, values in sorted(by_key.items())
        if key not in SET_BY_PLAN
        and (len(set.union(*values.values())) > 1 or values.keys() != inits.keys())
    }


def _check_cell(cell: Cell, folder: Path, config: Mapping[str, Any]) -> None:
    fraction = config.get("VIRTEX", {}).get("FRACTION", 1.0)
    for name, expected, found in (
        ("SEED", cell.seed, config.get("SEED")),
        ("VIRTEX.FRACTION", cell.fraction, fraction),
    ):
        if expected != found:
            raise InputError(
                f"{folder / 'config.yaml'}: expected {name} {expected}, found {found}: another run "
                "is in this folder. Remove it, or choose another --output."
            )


def _processes(folder: Path) -> int | None:
    try:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = _PROCESSES.findall(text)
    return int(found[-1]) if found else None


def percent(fraction: float) -> str:
    """0.1 -> "10", 0.005 -> "0.5"."""
    return f"{100 * fraction:.6g}"


def collect(patterns: Sequence[str]) -> tuple[list[str], list[Run]]:
    """Read runs by "NAME=FOLDERS", where FOLDERS is a shell pattern of OUTPUT_DIRs.

    Seed, fraction and all else come from each folder's config.yaml. Runs with the same test sets,
    architecture and length are compared with each other.

    Returns:
        The starts' names in the order of the patterns, and all runs.
    """
    names: list[str] = []
    runs: dict[Cell, Run] = {}
    for pattern in patterns:
        name, equals, folders = pattern.partition("=")
        if not (name and equals and folders):
            raise InputError(
                f"--collect {pattern!r}: expected NAME=FOLDERS, such as "
                "virtex='output/coco_virtex_seed*'."
            )
        found = sorted(
            path for path in glob.glob(os.path.expanduser(folders)) if os.path.isdir(path)
        )
        if not found:
            raise InputError(f"--collect {pattern!r}: no folder has such a name.")
        names.append(name)
        for folder in map(Path, found):
            run = read_run(_cell(name, folder), folder)
            if run.cell in runs:
                raise InputError(
                    f"{folder}: has the same start, config, fraction and seed as "
                    f"{runs[run.cell].folder}. Leave one out, or give it a name of its own."
                )
            _check_test_set(run, runs.values())
            runs[run.cell] = run
    return list(dict.fromkeys(names)), list(runs.values())


def _check_test_set(run: Run, others: Iterable[Run]) -> None:
    """Data sets that users name themselves may share a name and not their content."""
    for other in others:
        if other.cell.config == run.cell.config and _test_files(other) != _test_files(run):
            raise InputError(
                f"{run.folder}: was evaluated on {', '.join(_test_files(run))}, and {other.folder} "
                f"on {', '.join(_test_files(other))}, under the same name: their results cannot be "
                "compared."
            )


def _test_files(run: Run) -> list[str]:
    """The files' names: their folder may be another one on another machine."""
    names = run.config["DATASETS"]["TEST"]
    entries = run.config.get("VIRTEX", {}).get("DATASETS", [])
    return [os.path.basename(str(entry[2])) for entry in entries if entry[0] in names]


def _cell(name: str, folder: Path) -> Cell:
    config = read_run_config(folder)
    model, virtex = config["MODEL"], config.get("VIRTEX", {})
    parts = [
        "+".join(config["DATASETS"]["TEST"]),
        f"R{model['RESNETS']['DEPTH']}",
        "FPN" if "fpn" in model["BACKBONE"]["NAME"] else "C4",
        "masks" if model["MASK_ON"] else "boxes",
        f"{config['SOLVER']['MAX_ITER']} iterations",
    ]
    return Cell(", ".join(parts), float(virtex.get("FRACTION", 1.0)), name, config["SEED"])
