"""A finished run's folder -> its config, curves, results and costs."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.identity import flat
from virtex_d2.studies.compare.plan import Cell
from virtex_d2.studies.pipeline.stage import read_config
from virtex_d2.studies.reporting.metrics import Metrics

TASKS = {"bbox": "Box", "segm": "Mask"}
# Averages over all classes; NaN of these means that nothing was detected at all.
AVERAGES = ("AP", "AP50", "AP75")
_RESULT = re.compile(r"(?:(?P<data>[^/]+)/)?(?P<task>bbox|segm)(?P<kind>_\w+)?/(?P<name>.+)")
_PROCESSES = re.compile(r"Process 0 of (\d+);")
# Where these differ the starts differ, or the place, but not the comparison.
_EXPECTED = ("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "VIRTEX.FRACTION", "VIRTEX.FRACTION_SEED")


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
        return f"{data}{TASKS[self.task]} {self.name}{kind}"

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
        results: of its last evaluation, percent. NaN: nothing to measure, as of an absent class.
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


def read_run(cell: Cell, folder: Path) -> Run:
    """Read a run that has come to its end."""
    config = read_run_config(folder)
    _check_cell(cell, folder, config)
    length = config["SOLVER"]["MAX_ITER"]
    metrics = Metrics(folder / "metrics.json", length)
    curves = {}
    for key in metrics.keys:
        metric = Metric.parse(key)
        if metric is None:
            continue
        curve = metrics.curve(key)
        nothing = 0.0 if metric.name in AVERAGES else math.nan
        curves[metric] = {
            iteration: nothing if math.isnan(value) else value
            for iteration, value in zip(curve.iterations, curve.values)
        }
    done = max((max(curve) for curve in curves.values() if curve), default=0)
    if done < length:
        raise InputError(
            f"{metrics.path}: expected an evaluation after the last iteration ({length}), found "
            f"{f'the last one after {done}' if done else 'none'}. The run has not come to its end: "
            "continue it with --resume."
        )
    return Run(
        cell,
        folder,
        config,
        {metric: curve[length] for metric, curve in curves.items() if length in curve},
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


def config_differences(runs: Iterable[Run]) -> dict[str, dict[str, str]]:
    """Keys in which the runs of different starts differ beyond what makes them different starts.

    Returns:
        Key -> {start's name: its value, or values}.
    """
    by_key: dict[str, dict[str, set[str]]] = {}
    inits = []
    for run in runs:
        inits.append(run.cell.init)
        for key, value in flat(run.config):
            by_key.setdefault(key, {}).setdefault(run.cell.init, set()).add(repr(value))
    differing = {}
    for key, values in sorted(by_key.items()):
        all_values = {value for found in values.values() for value in found}
        if key not in _EXPECTED and (len(all_values) > 1 or len(values) < len(set(inits))):
            differing[key] = {
                init: ", ".join(sorted(values.get(init, {"absent"})))
                for init in dict.fromkeys(inits)
            }
    return differing


def find_predictions(folder: Path) -> Path | None:
    """A detector's stored predictions in COCO's result format; None where there are none.

    With several test sets, those of the first by name.
    """
    found = sorted((folder / "inference").rglob("*_instances_results.json"))
    return found[0] if found else None


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
