"""A comparison from beginning to end."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from virtex_d2.engine.cli import shell
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare import figures, pictures, report, tables
from virtex_d2.studies.compare.collection import collect
from virtex_d2.studies.compare.plan import MOST_INITS, Plan, check_plan, choose_baseline
from virtex_d2.studies.compare.runs import TASKS, Run, read_run
from virtex_d2.studies.compare.tables import Block
from virtex_d2.studies.pipeline.markers import checked_marker
from virtex_d2.studies.pipeline.process import cores
from virtex_d2.studies.pipeline.runner import claim_output, run_stages
from virtex_d2.studies.pipeline.stage import Stage, argv
from virtex_d2.studies.reporting.page import Picture

KIND = "comparison"  # of folder, in its record's name and in messages


@dataclass(frozen=True)
class Comparison:
    """A plan in its folder.

    Args:
        plan: the runs.
        root: the project's folder, with tools/ and configs/.
        output: the comparison's; new, or of an earlier call.
    """

    plan: Plan
    root: Path
    output: Path

    def __post_init__(self) -> None:
        if not (self.root / "tools" / "train_net.py").is_file():
            raise InputError(
                f"{self.root}: expected the project's folder, with tools/train_net.py."
            )

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """A stage for every run, in the plan's order."""
        return self.plan.stages(self.root, self.output)

    def commands(self) -> list[str]:
        """The command of every run, to be numbered from 0 in a job array."""
        check_plan(self.plan, self.root)
        return [shell(argv(stage, self.root)) for stage in self.stages]

    def _commands(self) -> list[str]:
        return [shell(argv(stage, self.root)) for stage in self.stages]

    def run(self, jobs: int = 0, only: int | None = None) -> None:
        """Run what is not done yet.

        Args:
            jobs: how many at the same time; 0: as many as there are GPUs for, one without.
            only: a run's number, from 0, beside which other processes may do others; None: all,
                and no other process does all of them meanwhile.

        Raises:
            pipeline.runner.StageFailedError: a run failed.
        """
        stages = self.stages
        if only is not None:
            if not 0 <= only < len(stages):
                raise InputError(
                    f"--only {only}: expected a run's number, 0 to {len(stages) - 1} (see --list)."
                )
            stages = stages[only : only + 1]
        check_plan(self.plan, self.root)
        claim_output(self.output, KIND, {"baseline": self.plan.baseline})
        print(
            f"{len(stages)} {'run' if len(stages) == 1 else 'runs'} into {self.output}, on "
            f"{cores()} cores. Commands run in {self.root}.",
            flush=True,
        )
        slots = _slots(jobs, self.plan.num_gpus)
        run_stages(stages, self.root, self.output, slots, alone=only is None)

    def finished(self) -> tuple[list[Run], list[str]]:
        """The finished runs, and the names of the others."""
        runs, missing = [], []
        for cell, stage in zip(self.plan.cells, self.stages):
            if checked_marker(stage, self.root, self.output).get("complete"):
                runs.append(read_run(cell, self.root / stage.folder))
            else:
                missing.append(stage.name)
        return runs, missing

    def report(self) -> tuple[Path, list[Block]]:
        """Write report.html, results.csv and summary.csv of the finished runs; prints the others.

        Returns:
            The report's path, and what is in it.
        """
        runs, missing = self.finished()
        if missing:
            count = f"{len(missing)} of {len(self.stages)} runs"
            print("\n  ".join([f"Not finished: {count}:", *missing]), flush=True)
        commands = {s.name: c for s, c in zip(self.stages, self._commands())}
        names = [init.name for init in self.plan.inits]
        return write_all(self.output, names, runs, missing, commands)


def report_collected(
    output: Path, patterns: Sequence[str], baseline: str = ""
) -> tuple[Path, list[Block]]:
    """Report on runs that were trained elsewhere (see `collection.collect`).

    Args:
        output: a folder for it; new, or of an earlier such report.
        patterns: "NAME=FOLDERS".
        baseline: a name; "": random where it is one of them, else the first.
    """
    names, runs = collect(patterns)
    if not 2 <= len(names) <= MOST_INITS:
        raise InputError(
            f"--collect: expected 2 to {MOST_INITS} initialisations to compare, found "
            f"{len(names)}: {', '.join(names)}. Name the runs of each with a --collect of its own."
        )
    baseline = choose_baseline(names, baseline)
    claim_output(output, KIND, {"collected": True})
    return write_all(output, sorted(names, key=lambda name: name != baseline), runs)


def write_all(
    output: Path,
    inits: Sequence[str],
    runs: Sequence[Run],
    missing: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> tuple[Path, list[Block]]:
    """Write report.html with its pictures, results.csv and summary.csv.

    Args:
        output: the folder.
        inits: the starts' names, the baseline first.
        runs: the finished runs.
        missing: names of the others.
        commands: of runs, by their names.
    """
    path = output / "report.html"
    path.unlink(missing_ok=True)  # it would not speak of these runs
    if not runs:
        raise InputError(f"{output}: no run is finished yet; there is nothing to report.")
    blocks = tables.make_blocks(inits, runs)
    tables.write_text(output / "results.csv", tables.results_csv(blocks))
    tables.write_text(output / "summary.csv", tables.summary_csv(blocks))
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    drawn = _draw(folder, blocks)
    drawn["predictions"], note = pictures.draw(folder, blocks)
    report.write_report(path, blocks, drawn, missing, commands or {}, note)
    return path, blocks


def _draw(folder: Path, blocks: Sequence[Block]) -> dict[str, list[Picture]]:
    drawn: dict[str, list[Picture]] = {"differences": [], "curves": [], "classes": []}
    metrics = list(dict.fromkeys(metric for block in blocks for metric in block.main))
    # A page of panels has room for two columns.
    for part, columns in enumerate(_pairs(metrics)):
        name = f"{part}" if len(metrics) > 2 else ""
        if len(blocks[0].runs) > 1:
            path = folder / f"differences{name}.png"
            figures.draw_differences(path, blocks, columns)
            drawn["differences"].append(Picture(path, *_WORDS["differences"]))
        path = folder / f"curves{name}.png"
        figures.draw_curves(path, blocks, columns)
        drawn["curves"].append(Picture(path, *_WORDS["curves"]))
    for number, block in enumerate(blocks):
        if len(block.complete) < 2 or block.baseline not in block.complete:
            continue
        task = "segm" if any(metric.task == "segm" for metric in block.main) else "bbox"
        path = folder / f"classes{number}.png"
        left_out = figures.draw_classes(path, block, task)
        alternative, words = _WORDS["classes"]
        place = f"{block.title}, {TASKS[task]} AP."
        others = f" {left_out} that change least are left out." if left_out else ""
        drawn["classes"].append(Picture(path, alternative, f"{place} {words}{others}"))
    return drawn


# What each picture shows, in words, and what is written below it.
_WORDS = {
    "differences": (
        "AP of each start minus that of the baseline, with every seed and a confidence interval",
        "Strokes are single seeds, the point is their mean, the line its 95 % interval.",
    ),
    "curves": (
        "AP of each start against iteration",
        "Thin lines are single seeds, the thick one is their mean. What a start is worth shows "
        "early; a long training may make up for a poor one.",
    ),
    "classes": (
        "AP by object size and by class minus that of the baseline",
        "Classes without a true object are left out.",
    ),
}


def _pairs(metrics: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(metrics), 2):
        yield metrics[start : start + 2]


def _slots(jobs: int, num_gpus: int) -> list[dict[str, str]]:
    """The environment of each place where a run can be: its GPUs, where there are any."""
    if jobs < 0:
        raise InputError(f"--jobs {jobs}: expected a number of runs at the same time.")
    devices = _visible_devices()
    if not devices:
        return [{}] * max(1, jobs)
    possible = len(devices) // num_gpus
    if not possible:
        raise InputError(f"--num-gpus {num_gpus}: only {len(devices)} GPUs are visible.")
    if jobs > possible:
        raise InputError(
            f"--jobs {jobs}: {len(devices)} GPUs are visible, which {possible} runs of {num_gpus} "
            "share."
        )
    count = jobs or possible
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[i * num_gpus : (i + 1) * num_gpus])}
        for i in range(count)
    ]


def _visible_devices() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    with contextlib.suppress(RuntimeError):
        count = torch.cuda.device_count()
        if listed:
            return listed.split(",")[:count]
        return [str(number) for number in range(count)]
    return []
