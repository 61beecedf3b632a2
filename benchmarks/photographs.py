"""Which short pretraining helps, on real photographs? Choose on seeds of its own, then judge once.

python benchmarks/photographs.py choose --output output/choose \\
    --captions captions_train.json --images images --voc VOC2007

Each run pretrains an arm of photographs_arms.py, and fits and reads VOC's linear SVMs on its
backbone.

choose      seeds 1 to 3; fitted on one part of VOC's `trainval` and read on the other. It works in
            a VOC folder of `trainval` alone: there is no `test` in it.
judge       seeds 11 to 18, 500 and 1 500 iterations; fitted on `trainval`, read on `test`. It waits
            until `RECIPE` there names what was chosen.
efficiency  VOC mAP against images: fractions of them, with 1 and with all captions of each; read on
            `test`, so that it waits, too.

What a finished run found is written at once into a small JSON file of its arm, below --results, and
is never made again, on whatever machine; what was stopped goes on with the same command. The design
is in docs/recipe.md.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torchvision
from yacs.config import CfgNode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import virtex_d2  # noqa: E402
from benchmarks.measuring import machine  # noqa: E402
from benchmarks.photographs_arms import (  # noqa: E402
    MEASURES,
    PRESETS,
    Options,
    Purpose,
    find_purpose,
)
from benchmarks.photographs_report import (  # noqa: E402
    draw,
    first_figure,
    lines_of,
    paper_table,
    read_records,
    report,
    views_table,
)
from pretrain.config import load_pretrain_config  # noqa: E402
from virtex_d2.annotations.voc import split_ids, split_list  # noqa: E402
from virtex_d2.checkpoint.resnet import recognise_resnet  # noqa: E402
from virtex_d2.checkpoint.source import read_backbone  # noqa: E402
from virtex_d2.checkpoint.starts import STARTS  # noqa: E402
from virtex_d2.engine.config import read_config  # noqa: E402
from virtex_d2.engine.errors import InputError, exit_on_input_error, nearest  # noqa: E402
from virtex_d2.engine.files import (  # noqa: E402
    read_json,
    require_file,
    sha256,
    write_json,
    write_text,
)
from virtex_d2.engine.identity import flat  # noqa: E402
from virtex_d2.studies.compare.runs import Cell, read_run  # noqa: E402
from virtex_d2.studies.stages import Stage, claim_output, exit_on_stop, run_stages  # noqa: E402

# What a study sets itself: in --opts these would make other runs than their names say.
_OWN_KEYS = ("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS")
PRETRAIN_KEYS = (
    *(*_OWN_KEYS, "SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "DATA.FRACTION"),
    *("DATA.CAPTIONS_PER_IMAGE", "DATA.TRAIN_CAPTIONS", "DATA.TRAIN_IMAGES"),
)
MEASURE_KEYS = (*_OWN_KEYS, "DATA.ROOT", "DATA.TRAIN", "DATA.TEST")


@dataclass(frozen=True)
class Run:
    """An arm with a seed and a length; an untrained start has length 0."""

    arm: str
    iterations: int
    seed: int

    @property
    def name(self) -> str:
        """For files: "tokens-500-seed1"."""
        return f"{self.arm}-{self.iterations}-seed{self.seed}"


class Study:
    """What a command line asks for: its runs, their stages and their records.

    Args:
        args: of `parser`, not for the report alone.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.purpose = args, find_purpose(args.purpose)
        self.preset, self.output = PRESETS[args.preset], args.output.resolve()
        self.config = args.config or self.preset.config
        self.opts = {**self.preset.pretrain, **_pairs(args.opts, "--opts", PRETRAIN_KEYS)}
        self.measure_config, opts = MEASURES[args.measure]
        opts = {**(self.preset.probe if args.measure == "svm" else {}), **opts}
        self.measure_opts = {**opts, **_pairs(args.measure_opts, "--measure-opts", MEASURE_KEYS)}
        self.runs = list(_runs(self.purpose, args))
        if args.measure != "svm" and args.purpose != "judge":
            raise InputError(f"--measure {args.measure}: detectors are for judge alone.")
        self.captions, self.images = (
            str(Path(given).resolve()) for given in (args.captions, args.images)
        )

    @cached_property
    def voc(self) -> str:
        """The VOC folder; for choosing one without `test`, which is made at the first question."""
        voc = self.args.voc.resolve()
        if self.args.purpose == "choose":
            voc = part_trainval(voc, self.output / "voc_parts")
        return str(voc)

    @cached_property
    def lists(self) -> dict[str, str]:
        """Hashes of the VOC lists that are used."""
        return {
            part: hashlib.sha256("\n".join(split_ids(self.voc, part)).encode()).hexdigest()[:16]
            for part in self.purpose.split
        }

    @cached_property
    def captions_hash(self) -> str:
        """Of the captions file."""
        require_file(self.captions)
        return sha256(self.captions)[:16]

    @cached_property
    def num_images(self) -> int:
        """How many images have captions."""
        try:
            return len({one["image_id"] for one in read_json(self.captions)["annotations"]})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{self.captions}: expected COCO's captions, `annotations` with an `image_id` each."
            ) from error

    def pretrain_config(self, opts: Options) -> CfgNode:
        """The config of pretrainings with options of their own; each key is checked."""
        return load_pretrain_config(str(ROOT / self.config), _words({**self.opts, **opts}))

    @cached_property
    def resnet(self) -> Options:
        """The keys with which detectron2 builds MODEL.VISUAL.NAME."""
        name = self.pretrain_config({}).MODEL.VISUAL.NAME
        with torch.device("meta"):
            state = getattr(torchvision.models, name)().state_dict()
        return {key: str(value) for key, value in recognise_resnet(state, name).config().items()}

    def stages(self, run: Run) -> list[Stage]:
        """The pretrainings of a run, then what measures its backbone."""
        arm = self.purpose.arms[run.arm]
        chain: list[Stage] = []
        for number, phase in enumerate(arm.phases):
            chain.append(self._pretraining(run, number, phase, chain[-1] if chain else None))
        return [*chain, self._measure(run, chain[-1] if chain else None)]

    def _pretraining(self, run: Run, number: int, phase: Options, before: Stage | None) -> Stage:
        arm = self.purpose.arms[run.arm]
        name = f"{run.name}-phase{number + 1}"
        folder = self.output / "pretrain" / run.name / f"phase{number + 1}"
        length = run.iterations // len(arm.phases)
        length += run.iterations % len(arm.phases) if number == 0 else 0
        cfg = self.pretrain_config(phase)
        warmup = round(length * cfg.SOLVER.WARMUP_ITERS / cfg.SOLVER.MAX_ITER)
        opts = {**self.opts, **phase, "SEED": str(run.seed), "OUTPUT_DIR": str(folder)}
        opts |= {"DATA.TRAIN_CAPTIONS": self.captions, "DATA.TRAIN_IMAGES": self.images}
        opts |= {"DATA.FRACTION": f"{arm.fraction:g}", "DATA.CAPTIONS_PER_IMAGE": str(arm.captions)}
        opts |= {"SOLVER.MAX_ITER": str(length), "SOLVER.WARMUP_ITERS": str(warmup)}
        opts |= {"SOLVER.CHECKPOINT_KEEP_LAST": "2"}
        if before:
            tasks = [each.get("MODEL.OBJECTIVE") for each in arm.phases[number - 1 : number + 1]]
            kept = "model_final.pth" if tasks[0] == tasks[1] else "backbone.safetensors"
            opts["MODEL.WEIGHTS"] = f"{before.folder}/{kept}"
        title = f"{run.name}: {cfg.MODEL.OBJECTIVE}, {length} iterations"
        return self._stage(
            *("tools/pretrain_net.py", self.config, name, title, opts, before),
            group=f"step {number}",
            files=(self.captions,),
        )

    def _measure(self, run: Run, pretraining: Stage | None) -> Stage:
        measure, arm = self.args.measure, self.purpose.arms[run.arm]
        weights = f"{pretraining.folder}/backbone.safetensors" if pretraining else run.arm
        opts = {**self.resnet, "SEED": str(run.seed), "MODEL.WEIGHTS": weights}
        opts |= {"OUTPUT_DIR": str(self.output / measure / run.name)}
        tool = "tools/linear_probe.py" if measure == "svm" else "tools/train_net.py"
        if measure == "svm":
            fit, read = self.purpose.split
            opts |= {"DATA.ROOT": self.voc, "DATA.TRAIN": fit, "DATA.TEST": read}
            opts |= {"DATA.CACHE_DIR": str(self.output / "features")}
        elif measure == "voc":
            splits = zip(("voc_train", "voc_test"), self.purpose.split)
            opts["VIRTEX.DATASETS"] = repr([[n, "voc", self.voc, part] for n, part in splits])
            opts |= {"DATASETS.TRAIN": "('voc_train',)", "DATASETS.TEST": "('voc_test',)"}
        opts |= self.measure_opts
        name, title = f"{run.name}-{measure}", f"{run.name}: {measure}"
        return self._stage(
            *(tool, self.measure_config, name, title, opts, pretraining),
            group=f"step {len(arm.phases)}",
        )

    def _stage(
        self,
        tool: str,
        config: str,
        name: str,
        title: str,
        opts: Options,
        before: Stage | None,
        group: str,
        files: tuple[str, ...] = (),
    ) -> Stage:
        gpus = self.args.num_gpus
        flags = ["--config-file", config, *(["--num-gpus", str(gpus)] if gpus is not None else [])]
        needs = (before,) if before else ()
        command, folder = (tool, *flags, *_words(opts)), opts["OUTPUT_DIR"]
        return Stage(name, title, command, folder, (config,), needs, files, label=name, group=group)

    def record_file(self, run: Run) -> Path:
        """Where the figures of an arm's seeds are."""
        folder = self.args.results / self.args.purpose
        return folder / f"{run.arm}-{run.iterations}-{self.args.measure}.json"

    def design(self, run: Run) -> dict[str, Any]:
        """Say what a record's figures are of, but for seed and code: no paths."""
        arm, measure = self.purpose.arms[run.arm], self.args.measure
        found: dict[str, Any] = {"measure": {**_content(self.measure_config), **self.measure_opts}}
        found["measure"] |= self.resnet
        if measure != "person":
            found["measure"] |= self.lists
        if arm.phases:
            data = {"fraction": f"{arm.fraction:g}", "captions": str(arm.captions)}
            found["pretrain"] = {**_content(self.config), **self.opts, **data}
            found["pretrain"]["file"] = self.captions_hash
            found |= {f"phase{n}": dict(phase) for n, phase in enumerate(arm.phases, start=1)}
        for part in found.values():
            part.pop("DATA.NUM_WORKERS", None)  # changes speed alone
        return found

    def recorded(self, run: Run) -> dict[str, Any]:
        """Read the record of an arm; what is in it must be of this design."""
        path, design = self.record_file(run), self.design(run)
        if not path.is_file():
            arm, found = self.purpose.arms[run.arm], {"arm": run.arm, "iterations": run.iterations}
            found["views"] = run.iterations * self.pretrain_config({}).SOLVER.IMS_PER_BATCH
            found["images"] = round(arm.fraction * self.num_images) if arm.phases else 0
            return {**found, "design": design, "seeds": {}}
        found = read_json(path)
        then, now = (dict(flat(each)) for each in (found["design"], design))
        if told := [
            f"{key}: {then.get(key, 'not given')} before, now {now.get(key, 'not given')}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]:
            raise InputError(
                f"{path}: holds figures of another design:\n  " + "\n  ".join(told) + "\nGive all "
                "of it as it was, or another folder as --results, or name the arm anew."
            )
        return found

    def record(self, run: Run, stages: Sequence[Stage], markers: Mapping[str, Any]) -> None:
        """Write a finished run's figures, then remove its checkpoints: only backbones are used."""
        folder, measure = Path(stages[-1].folder), self.args.measure
        read = svm_figures if measure == "svm" else detector_figures
        figures, device = read(folder, run)
        threads = int(markers[stages[-1].name]["threads"])
        seconds = [round(markers[stage.name]["seconds"]) for stage in stages]
        entry = {
            "figures": {name: round(value, 4) for name, value in figures.items()},
            "scale": self._last_scale(run, stages),
            "seconds": {"pretrain": sum(seconds[:-1]), "measure": seconds[-1]},
            "code": code_version(),
            "machine": {**machine(torch.device(device)), "threads": threads},
        }
        found = self.recorded(run)
        seeds = {**found["seeds"], str(run.seed): entry}
        found["seeds"] = {seed: seeds[seed] for seed in sorted(seeds, key=int)}
        write_json(self.record_file(run), found)
        for stage in stages[:-1]:
            for path in Path(stage.folder).glob("model_*.pth"):
                path.unlink()

    def _last_scale(self, run: Run, stages: Sequence[Stage]) -> float:
        if len(stages) == 1:
            return float(run.arm == STARTS[0])
        scale = read_backbone(f"{stages[-2].folder}/backbone.safetensors").last_norm_scale
        return round(scale, 4)

    def run(self) -> None:
        """Do what is not recorded, --jobs runs at a time."""
        kind = {"purpose": self.args.purpose, "preset": self.args.preset}
        claim_output(self.output, "photographs", kind)
        todo = [run for run in self.runs if str(run.seed) not in self.recorded(run)["seeds"]]
        for arm in {run.arm for run in todo}:
            self.stages(next(run for run in todo if run.arm == arm))  # every key is checked now
        print(f"{len(self.runs)} runs, {len(self.runs) - len(todo)} of them recorded.", flush=True)
        for first in range(0, len(todo), self.args.jobs):
            runs = todo[first : first + self.args.jobs]
            chains = {run: self.stages(run) for run in runs}
            steps = itertools.zip_longest(*chains.values())
            stages = sorted(
                (stage for step in steps for stage in step if stage), key=lambda stage: stage.group
            )
            markers = run_stages(stages, ROOT, self.output, [{}] * self.args.jobs)
            for run, chain in chains.items():
                self.record(run, chain, markers)


def _runs(purpose: Purpose, args: argparse.Namespace) -> Iterator[Run]:
    arms = _chosen(args.arms, tuple(purpose.arms), "--arms")
    seeds = _chosen(args.seeds, purpose.seeds, "--seeds")
    for arm in arms:
        trained = bool(purpose.arms[arm].phases)
        for iterations in (args.iterations or purpose.iterations) if trained else (0,):
            for seed in seeds:
                yield Run(arm, iterations, seed)


def _chosen(given: Sequence | None, known: Sequence, flag: str) -> Sequence:
    """Keep the order of the table; refuse what is not in it."""
    if wrong := [one for one in given or () if one not in known]:
        names = [str(one) for one in known]
        raise InputError(
            f"{flag} {wrong[0]}: for this purpose expected some of {', '.join(names)}."
            + nearest(str(wrong[0]), names)
        )
    return [one for one in known if not given or one in given]


def _content(config: str) -> dict[str, str]:
    """Name a config file, and what is in it: a recipe may become another under its old name."""
    content = json.dumps(read_config(ROOT / config), sort_keys=True)
    return {"config": config, "content": hashlib.sha256(content.encode()).hexdigest()[:16]}


def _words(opts: Options) -> list[str]:
    return [word for pair in opts.items() for word in pair]


def _pairs(words: Sequence[str], flag: str, own: Sequence[str]) -> dict[str, str]:
    if len(words) % 2:
        raise InputError(f"{flag}: expected KEY VALUE pairs; {words[-1]} has no value.")
    if taken := [key for key in words[::2] if key in own]:
        raise InputError(
            f"{flag}: {taken[0]} follows from the arm, the purpose and the flags; leave it out."
        )
    return dict(zip(words[::2], words[1::2]))


def part_trainval(voc: Path, folder: Path) -> Path:
    """Make a VOC folder of `trainval` alone, its images in two parts, "fit" and "read".

    The part follows from a hash of the image's name, so that it is the same everywhere.
    """
    names = split_ids(str(voc), "trainval")
    has_test = os.path.exists(split_list(str(voc), "test"))
    test = split_ids(str(voc), "test") if has_test else []
    if shared := sorted(set(names) & set(test)):
        raise InputError(
            f"{voc}: {len(shared)} images are in `trainval` and in `test`; the first: {shared[0]}. "
            "What is chosen on them would be judged on them, too."
        )
    parts: dict[str, list[str]] = {"fit": [], "read": []}
    for name in names:
        parts["read" if hashlib.sha256(name.encode()).digest()[0] % 2 else "fit"].append(name)
    for part, members in parts.items():
        write_text(split_list(str(folder), part), "".join(f"{name}\n" for name in members))
    for kind in ("Annotations", "JPEGImages"):
        link, target = folder / kind, voc / kind
        if not link.is_symlink():
            link.symlink_to(target)
        elif link.resolve() != target.resolve():
            raise InputError(f"{link}: is {link.resolve()}, not {target}: choose another --output.")
    return folder


def svm_figures(folder: Path, run: Run) -> tuple[dict[str, float], str]:
    """What linear_probe.py found, in percent, and on which device."""
    found = read_json(folder / "results.json")
    metrics = found["metrics"]
    return {"mAP": metrics["mAP"], "mAP11": metrics["mAP11"]}, found["config"]["MODEL"]["DEVICE"]


def detector_figures(folder: Path, run: Run) -> tuple[dict[str, float], str]:
    """A detector's AP at each evaluation, the last first, and its device."""
    found = read_run(Cell("", 1.0, run.arm, run.seed), folder)
    figures = {
        (-iteration, metric.label): value
        for metric, curve in found.curves.items()
        if metric.name == "AP" and not metric.kind
        for iteration, value in curve.items()
    }
    ordered = sorted(figures)  # box before mask
    return {f"{name} after {-i}": figures[i, name] for i, name in ordered}, found.device


def code_version() -> str:
    """The commit, and whether code or configs differ from it; outside git the version."""

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit.returncode:
        return virtex_d2.__version__
    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.yaml").returncode
    return commit.stdout.strip() + (" and changes" if changed else "")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("purpose", choices=["choose", "judge", "efficiency"])
    own.add_argument("--output", type=Path, help="folder of runs; may be removed when all is done")
    own.add_argument("--captions", type=Path, help="to pretrain on, in COCO's format")
    own.add_argument("--images", type=Path, help="their folder")
    own.add_argument("--voc", type=Path, help="a VOC folder with the lists trainval and test")
    default = ROOT / "benchmarks" / "results" / "photographs"
    own.add_argument("--results", type=Path, default=default, help="folder of the records")
    own.add_argument("--report-only", action="store_true", help="of what is recorded; no runs")
    own.add_argument("--arms", nargs="+", help="default: all, as they stand in the table")
    own.add_argument("--seeds", type=int, nargs="+", help="some of the purpose's")
    own.add_argument("--iterations", type=int, nargs="+", help="of a pretraining, each a run")
    about = "what judges backbones; person: its data are in DETECTRON2_DATASETS"
    own.add_argument("--measure", choices=[*MEASURES], default="svm", help=about)
    own.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    own.add_argument("--preset", choices=[*PRESETS], default="small")
    own.add_argument("--config", help="of pretrainings, instead of the preset's")
    own.add_argument("--num-gpus", type=int, help="of each tool")
    own.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="of pretrainings")
    own.add_argument(
        "--measure-opts", nargs="*", default=[], metavar="KEY VALUE", help="of what judges them"
    )
    return own


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not args.report_only:
        names = ("output", "captions", "images", "voc")
        if lacking := [f"--{name}" for name in names if getattr(args, name) is None]:
            raise InputError(f"{', '.join(lacking)}: expected for runs, or else --report-only.")
        Study(args).run()
    print(f"\n{summary(args)}")


def summary(args: argparse.Namespace) -> str:
    """Report what is recorded of a purpose, and draw it where there is a curve."""
    purpose = find_purpose(args.purpose)
    arms = purpose.arms
    records = read_records(args.results, args.purpose, arms, args.measure)
    views = views_table(records)
    parts = [*(report(records, arms, base) for base in purpose.bases), views]
    axis = "images" if args.purpose == "efficiency" else "views" if views else ""
    if axis and records:
        path = args.results / args.purpose / f"{args.measure}.png"
        name = f"{first_figure(records)} on VOC's `{purpose.split[1]}`"
        draw(path, name, f"{axis} of the pretraining", lines_of(records, arms, axis))
        parts += [paper_table(), f"The curves: {path}"]
    return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
    with exit_on_input_error(), exit_on_stop():
        main()
