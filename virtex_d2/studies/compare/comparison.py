"""A comparison in its folder: its runs done once, continued and reported."""

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from virtex_d2.engine.cli import shell
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.leaks import find_leaks
from virtex_d2.studies.compare.plan import MOST_INITS, Plan, check_plan, choose_baseline
from virtex_d2.studies.compare.report import write_report
from virtex_d2.studies.compare.runs import SVM, Run, collect, read_probe, read_run
from virtex_d2.studies.compare.tables import Block, Probes
from virtex_d2.studies.probes.config import get_probe_cfg
from virtex_d2.studies.probes.data import load_datasets
from virtex_d2.studies.probes.svm import unfit_classes
from virtex_d2.studies.stages import Stage, checked_marker, claim_output, cores, run_stages

KIND = "comparison"  # of folder, in its record's name and in messages


@dataclass(frozen=True)
class Comparison:
    """A plan in its folder.

    Args:
        plan: the runs.
        root: the project's folder, with tools/ and configs/.
        output: the comparison's; new, or of an earlier call.
        captions: (annotation file, image folder) of what starts were pretrained on.
    """

    plan: Plan
    root: Path
    output: Path
    captions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not (self.root / "tools" / "train_net.py").is_file():
            raise InputError(
                f"{self.root}: expected the project's folder, with tools/train_net.py."
            )

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """A stage for every run, in the plan's order."""
        return self.plan.stages(self.root, self.output)

    def commands(self) -> dict[str, str]:
        """Give each run's command by its name; in a job array they are numbered from 0."""
        return {stage.name: shell(stage.argv(self.root)) for stage in self.stages}

    def run(self, jobs: int = 0, only: int | None = None) -> None:
        """Run what is not done yet.

        Args:
            jobs: how many at the same time; 0: as many as there are GPUs for, one without.
            only: a run's number, from 0, beside which other processes may do others; None: all,
                and no other process does all of them meanwhile.

        Raises:
            StageFailedError: a run failed.
        """
        stages = self.stages
        if only is not None:
            if not 0 <= only < len(stages):
                raise InputError(
                    f"--only {only}: expected a run's number, 0 to {len(stages) - 1} (see --list)."
                )
            stages = stages[only : only + 1]
        check_plan(self.plan, self.root)
        unasked = self.unasked()
        stages = [stage for stage in stages if stage.name not in unasked]
        claim_output(self.output, KIND, {"baseline": self.plan.baseline})
        print(
            f"{len(stages)} {'run' if len(stages) == 1 else 'runs'} into {self.output}, on "
            f"{cores()} cores. Commands run in {self.root}.",
            flush=True,
        )
        if only is None:
            for sentence in self.notes():
                print(sentence, flush=True)
        slots = gpu_slots(jobs, self.plan.num_gpus)
        run_stages(stages, self.root, self.output, slots, alone=only is None)

    def finished(self) -> tuple[list[Run], list[str]]:
        """Read the finished runs of detectors, and name all that is not finished."""
        runs, missing, unasked = [], [], self.unasked()
        for cell, stage in zip(self.plan.cells, self.stages):
            if not self._is_finished(stage):
                if stage.name not in unasked:
                    missing.append(stage.name)
            elif cell.step != SVM:
                runs.append(read_run(cell, self.root / stage.folder))
        return runs, missing

    def probes(self) -> list[Probes]:
        """Read what the finished SVMs found, of every config and fraction."""
        found: dict[tuple[str, float], dict[str, dict[int, dict[str, float]]]] = {}
        for cell, stage in zip(self.plan.cells, self.stages):
            if cell.step == SVM and self._is_finished(stage):
                place = found.setdefault((cell.config, cell.fraction), {})
                place.setdefault(cell.init, {})[cell.seed] = read_probe(self.root / stage.folder)
        names = [init.name for init in self.plan.inits]
        return [
            Probes(config, fraction, {name: runs.get(name, {}) for name in names})
            for (config, fraction), runs in found.items()
        ]

    def _is_finished(self, stage: Stage) -> bool:
        return bool(checked_marker(stage, self.root, self.output).get("complete"))

    def report(self) -> tuple[Path, list[Block]]:
        """Write the report of the finished runs, and print the others.

        Returns:
            The report's path, and what is in it.
        """
        runs, missing = self.finished()
        if missing:
            count = f"{len(missing)} of {len(self.stages)} runs"
            print("\n  ".join([f"Not finished: {count}:", *missing]), flush=True)
        names = [init.name for init in self.plan.inits]
        return write_report(
            self.output,
            names,
            runs,
            missing,
            self.commands(),
            root=self.root,
            probes=self.probes(),
            notes=self.notes(),
        )

    def unasked(self) -> dict[str, str]:
        """Say by their stages' names which SVMs these images cannot train, and why."""
        reasons = {}
        for cell, stage in zip(self.plan.cells, self.stages):
            if cell.step == SVM and not self._is_finished(stage):
                words = self.plan.probe_options(self.root, cell.config, self.plan.inits[0])
                if reason := _hindrance(words, cell.fraction, cell.seed):
                    reasons[stage.name] = reason
        return reasons

    def notes(self) -> list[str]:
        """Say which steps are left out, and which test images are among the captioned ones."""
        return [
            *(f"{name} is left out: {reason}." for name, reason in self.unasked().items()),
            *self._leaks(),
        ]

    def _leaks(self) -> list[str]:
        if not self.captions:
            return []
        init = self.plan.inits[0]
        configs = [self.plan.detector_config(self.root, c, init) for c in self.plan.configs]
        return find_leaks(self.captions, configs, self.output / "leaks.json")


def report_collected(
    output: Path, patterns: Sequence[str], baseline: str = ""
) -> tuple[Path, list[Block]]:
    """Report on runs that were trained elsewhere (see `runs.collect`).

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
    return write_report(output, sorted(names, key=lambda name: name != baseline), runs)


@functools.cache  # for all starts, and for running and reporting
def _hindrance(words: tuple[str, ...], fraction: float, seed: int) -> str:
    """Say why no SVM of a probe can be trained; "" where one can."""
    more = ("VIRTEX.FRACTION", repr(fraction), "VIRTEX.FRACTION_SEED", str(seed))
    cfg = load_config(get_probe_cfg(), None, (*words, *more))
    train, test = load_datasets(cfg)
    reasons = unfit_classes(cfg, train.classes, train.labels, test.labels)
    if len(reasons) < len(train.classes):
        return ""
    name, reason = next(iter(reasons.items()))
    return f"none of {len(reasons)} classes can be asked for; {name}: {reason}"


def gpu_slots(jobs: int, num_gpus: int) -> list[dict[str, str]]:
    """Give the environment of each place where a run can be: its GPUs, where there are any."""
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
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[i * num_gpus : (i + 1) * num_gpus])}
        for i in range(jobs or possible)
    ]


def _visible_devices() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    with contextlib.suppress(RuntimeError):
        count = torch.cuda.device_count()
        return listed.split(",")[:count] if listed else [str(number) for number in range(count)]
    return []
