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

from pretrain.config import get_pretrain_cfg
from pretrain.trainer import PretrainTrainer
from virtex_d2.data.shapes_write import write_dataset
from virtex_d2.runtime.atomic import atomic_path
from virtex_d2.runtime.config import load_config
from virtex_d2.runtime.evaluations import MetricsWriter

from .step import Step

ROOT = Path(__file__).resolve().parents[2]
WORDS = 20_000  # different ones in the longer captions


def world(step: Step) -> Path:
    """The folder of the synthetic world; written where it is not there yet.

    On a GPU captions get words of no meaning behind them, so that their lengths and the vocabulary
    are as COCO's, which decoders' times depend on.
    """
    folder, scale = step.folder / "world", step.scale
    captions = folder / "annotations" / "captions.json"
    if captions.is_file():
        return folder
    for seed, split in enumerate(("train", "val")):
        count = scale.images if split == "train" else max(4, scale.images // 8)
        write_dataset(folder, split, count, scale.side, seed=seed, overwrite=True)
    content = json.loads((folder / "annotations" / "captions_train.json").read_text())
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(WORDS)]
    for annotation in content["annotations"] if step.cuda else []:
        said = annotation["caption"].split()[: rng.randint(3, 8)]
        annotation["caption"] = " ".join(said + rng.choices(words, k=rng.randint(1, 4)))
    with atomic_path(captions) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    return folder


def pretrain_options(step: Step, folder: Path, *options: object) -> list[str]:
    """KEY VALUE of the largest of the paper's models, at the step's scale."""
    scale, data = step.scale, world(step)
    keys = {
        "OUTPUT_DIR": folder,
        "MODEL.DEVICE": step.device.type,
        "MODEL.VISUAL.NAME": scale.network,
        "MODEL.TEXTUAL.HIDDEN_SIZE": scale.width,
        "DATA.TRAIN_CAPTIONS": data / "annotations" / "captions.json",
        "DATA.TRAIN_IMAGES": data / "images" / "train",
        "DATA.IMAGE_SIZE": scale.crop,
        "DATA.VOCAB_SIZE": scale.vocabulary,
        "DATA.NUM_WORKERS": min(12, os.cpu_count() or 1) if step.cuda else 0,
        "SOLVER.IMS_PER_BATCH": scale.batch,
        "SOLVER.CHECKPOINT_PERIOD": 1_000_000,
        "LOG_PERIOD": 1,
    }
    if (tokenizer := step.folder / "tokenizer.model").is_file():  # training one takes seconds
        keys["DATA.TOKENIZER"] = tokenizer
    return [str(word) for pair in keys.items() for word in pair] + [str(o) for o in options]


def run_tool(name: str, *arguments: object) -> int:
    """Run a tool as typed; its output goes to the step's log. Returns the exit code."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Iteration -> what a run's metrics.json says of it."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


def loss_of(record: dict[str, float]) -> float:
    """The sum of an iteration's losses."""
    return sum(value for key, value in record.items() if key.startswith("loss_"))


def build_trainer(step: Step, name: str, *options: object) -> PretrainTrainer:
    """A trainer in this process, in a folder of that name, which writes no metrics."""
    folder = step.folder / name
    cfg = load_config(get_pretrain_cfg(), "", pretrain_options(step, folder, *options))
    folder.mkdir(parents=True, exist_ok=True)
    trainer = PretrainTrainer(cfg)
    # training ends and goes on several times, writers once
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, MetricsWriter)]
    return trainer


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
    batch = next(iter(trainer.data.train_loader(trainer.cfg, 0)))

    def repeated(*_: object) -> Iterator[dict]:
        while True:
            yield dict(batch)

    trainer.data.train_loader = repeated
    try:
        yield
    finally:
        del trainer.data.train_loader
