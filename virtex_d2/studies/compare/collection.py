"""Folders of runs that were trained elsewhere, taken into a comparison."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.plan import Cell
from virtex_d2.studies.compare.runs import Run, read_run, read_run_config


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
