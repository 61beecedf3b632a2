"""Pretraining as users have it, on a synthetic world: by the tool, or a trainer in this process."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from detectron2.engine import HookBase
from filelock import FileLock

from pretrain.config import get_pretrain_cfg
from pretrain.methods.captioning.tokenizer import train_tokenizer
from pretrain.trainer import PretrainTrainer
from virtex_d2.engine.config import load_config
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.hooks import MetricsWriter
from virtex_d2.studies.shapes.write import write_dataset

from .step import Step

ROOT = Path(__file__).resolve().parents[2]
WORDS = 20_000  # different ones in the longer captions


def world(step: Step) -> Path:
    """The folder of the synthetic world; written where it is not there yet.

    On a GPU captions get words of no meaning behind them, so that their lengths and the vocabulary
    are as COCO's, which decoders' times depend on.
    """
    folder = step.folder / "world"
    captions = folder / "annotations" / "captions.json"
    if captions.is_file():
        return folder
    with FileLock(step.folder / "world.lock"):  # two steps may need it at once
        if not captions.is_file():
            _write_world(step, folder, captions)
    return folder


def _write_world(step: Step, folder: Path, captions: Path) -> None:
    scale = step.scale
    for seed, split in enumerate(("train", "val")):
        count = scale.images if split == "train" else max(4, scale.images // 8)
        write_dataset(folder, split, count, scale.side, seed=seed, overwrite=True)
    content = json.loads((folder / "annotations" / "captions_train.json").read_text())
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(WORDS)]
    for annotation in content["annotations"] if step.cuda else []:
        said = annotation["caption"].split()[: rng.randint(3, 8)]
        annotation["caption"] = " ".join(said + rng.choices(words, k=rng.randint(1, 4)))
    texts = (annotation["caption"] for annotation in content["annotations"])
    train_tokenizer(texts, step.scale.vocabulary, folder / "tokenizer.model")
    with atomic_path(captions) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def options(step: Step, folder: Path, *words: object) -> list[str]:
    """KEY VALUE of the largest of the paper's models at the step's scale; `words` are more."""
    scale, data = step.scale, world(step)
    workers = min(12, os.cpu_count() or 1) if step.cuda else 0
    keys = f"MODEL.DEVICE {step.device.type} MODEL.VISUAL.NAME {scale.network}"
    keys += f" MODEL.TEXTUAL.HIDDEN_SIZE {scale.width} DATA.IMAGE_SIZE {scale.crop}"
    keys += f" DATA.VOCAB_SIZE {scale.vocabulary} DATA.NUM_WORKERS {workers}"
    keys += f" SOLVER.IMS_PER_BATCH {scale.batch} SOLVER.CHECKPOINT_PERIOD 1000000"
    paths = ["OUTPUT_DIR", folder, "DATA.TRAIN_CAPTIONS", data / "annotations" / "captions.json"]
    paths += ["DATA.TRAIN_IMAGES", data / "images" / "train"]
    paths += ["DATA.TOKENIZER", data / "tokenizer.model"]
    return [*keys.split(), *map(str, [*paths, *words])]


def tool(step: Step, name: str, *words: object) -> bool:
    """Run a tool as typed, and record whether it ends well; its output goes to the log."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    flags = " --resume" if "--resume" in words else ""
    step.check(f"{name}{flags} ends well", code == 0, f"exit code {code}")
    return code == 0


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Iteration -> what a run's metrics.json says of it."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


def loss_of(record: dict[str, float]) -> float:
    """The sum of an iteration's losses."""
    return sum(value for key, value in record.items() if key.startswith("loss_"))


def trainer(step: Step, *words: object, config_file: str = "", given: list[str] | None = None):
    """A trainer in this process, which writes no metrics; `given` stands in for `options`."""
    folder = step.fresh("trainer")
    given = options(step, folder, *words) if given is None else [*given, "OUTPUT_DIR", str(folder)]
    built = PretrainTrainer(load_config(get_pretrain_cfg(), config_file, given))
    # training ends and goes on several times, writers once
    built._hooks = [hook for hook in built._hooks if not isinstance(hook, MetricsWriter)]
    return built


class _Enough(BaseException):
    """Ends a training from within; not an Exception, which the loop would log as an error."""


class Clock(HookBase):
    """Times iterations, and ends training after so many of them without writing anything.

    On a GPU an event is recorded behind each iteration, and only the ends are waited for.

    Args:
        count: iterations that are timed.
        warm_up: iterations before them.
        around: name of each iteration -> a context that it runs in.
    """

    def __init__(
        self,
        count: int,
        warm_up: int = 3,
        around: Callable[[int], contextlib.AbstractContextManager] | None = None,
    ):
        self._count, self._warm_up, self._around = count, warm_up, around
        self._done, self._events = 0, []
        self.stamps: list[float] = []  # when each iteration had been queued, seconds
        self.losses: list[float] = []
        self.data_seconds: list[float] = []

    def before_step(self) -> None:
        if self._done == self._warm_up:
            self._mark()
            self._start = self._now()
        self._context = self._around(self._done) if self._around else contextlib.nullcontext()
        self._context.__enter__()

    def after_step(self) -> None:
        self._context.__exit__(None, None, None)
        self._done += 1
        if self._done > self._warm_up:
            self._mark()
        if self._done == self._warm_up + self._count:
            self.seconds = self._now() - self._start
            self._read()
            raise _Enough

    def by_events(self) -> list[float]:
        """Seconds of each iteration: of the GPU's between events, else between stamps."""
        if self._events:
            pairs = zip(self._events, self._events[1:])
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in zip(self.stamps, self.stamps[1:])]

    def _mark(self) -> None:
        self.stamps.append(time.perf_counter())
        if self.trainer.device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def _now(self) -> float:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _read(self) -> None:
        self.trainer.before_checkpoint()  # looks at what has not been read yet
        histories = self.trainer.storage.histories()
        named = [name for name in histories if name.startswith("loss_")]
        columns = [[value for value, _ in histories[name].values()] for name in named]
        self.losses = [sum(row) for row in zip(*columns)]
        self.data_seconds = [value for value, _ in histories["data_time"].values()]


def train(trainer: PretrainTrainer, clock: Clock) -> Clock:
    """Train until the clock has enough; called again, training goes on."""
    trainer.register_hooks([clock])
    try:
        trainer.train()
    except _Enough:
        trainer.start_iter = trainer.iter + 1
    finally:
        trainer._hooks.remove(clock)
    return clock


@contextlib.contextmanager
def same_batch(trainer: PretrainTrainer) -> Iterator[None]:
    """Within, each iteration gets the first batch: what is timed is the step, not the loader."""
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.DATA.NUM_WORKERS = 0  # they would make many more
    batch = next(iter(trainer.data.train_loader(cfg, 0)))

    def repeated(*_: object) -> Iterator[dict]:
        while True:
            yield dict(batch)

    trainer.data.train_loader = repeated
    try:
        yield
    finally:
        del trainer.data.train_loader
