"""The small runs that `benchmarks/kill_matrix.py` disturbs, and what they leave."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import _SMALL, _SMALL_DETECTOR, THIN_BACKBONE
from tests.e2e.captioned_world import THIN, write_world
from tests.e2e.forked_runs import ROOT, Forkserver, Process
from virtex_d2.studies.shapes.write import write_dataset

ITERATIONS = 10
CHECKPOINT_PERIOD = 4
EVAL_PERIOD = 5
_PERIODS = (
    *("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", CHECKPOINT_PERIOD),
    *("TEST.EVAL_PERIOD", EVAL_PERIOD),
)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: for the table.
        tool: a script of this project.
        begins, ends: what the log says when an evaluation begins and when its results are there.
    """

    name: str
    tool: str
    begins: str
    ends: str


CASES = {
    case.name: case
    for case in (
        Case("pretrain", "tests/thin/pretrain_net.py", "Validating on", "Validation: "),
        Case("FPN", "tools/train_net.py", "Start inference on", "copypaste: Task: segm"),
        Case("C4", "tools/train_net.py", "Start inference on", "copypaste: Task: segm"),
    )
}


class World:
    """The data of all cases, in one folder."""

    def __init__(self, folder: Path):
        self._captions, self._shapes = folder / "captions", folder / "shapes"
        write_world(self._captions, 24)
        write_dataset(self._shapes, "train", 12, size=64, seed=1)
        write_dataset(self._shapes, "test", 4, size=64, seed=2)

    def command(self, case: Case, output: Path) -> list[str]:
        """argv of a run that goes on where there is something to go on from."""
        options = self._pretraining() if case.name == "pretrain" else self._detector(case.name)
        tool = str(ROOT / case.tool)
        return [tool, "--resume", *map(str, options), "OUTPUT_DIR", str(output)]

    def _pretraining(self) -> list[object]:
        options = {
            **THIN,
            "MODEL.TEXTUAL.HIDDEN_SIZE": 32,
            "MODEL.TEXTUAL.ATTENTION_HEADS": 2,
            "DATA.NUM_WORKERS": 1,
            "DATA.STREAM_BLOCK": 3,
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.CNN_LR": 0.01,  # the paper's rate makes batches of four diverge
            "SOLVER.WARMUP_ITERS": 2,
            "TEST.IMS_PER_BATCH": 2,
            "TEST.BEST_METRIC": "val/loss",
            "LOG_PERIOD": 1,
            **json.loads((self._captions / "pipe.options.json").read_text()),
        }
        return [part for pair in options.items() for part in pair] + list(_PERIODS)

    def _detector(self, kind: str) -> list[object]:
        sets = [
            [f"world_{split}", "coco", str(self._shapes / f"annotations/instances_{split}.json")]
            + [str(self._shapes / "images" / split)]
            for split in ("train", "test")
        ]
        return [
            *("--config-file", ROOT / "configs" / f"Base-RCNN-{kind}.yaml"),
            *_SMALL_DETECTOR.split(),
            *_SMALL[kind].split(),
            *THIN_BACKBONE.split(),
            *("VIRTEX.DATASETS", repr(sets), "VIRTEX.LOG_PERIOD", 1),
            *("DATASETS.TRAIN", "('world_train',)", "DATASETS.TEST", "('world_test',)"),
            *("INPUT.MIN_SIZE_TRAIN", "(48,64,80)", "DATALOADER.NUM_WORKERS", 1),
            *("VIRTEX.EMA.ENABLED", True, "VIRTEX.EMA.DECAY", 0.5),
            *_PERIODS,
        ]


class Run:
    """A run in one output folder, started as often as it needs.

    Args:
        server: starts its processes.
        command: of `World.command`.
        output: OUTPUT_DIR; the log of all processes is beside it, and so is the marker.
        processes: 1, or as many as there are ranks.
    """

    def __init__(self, server: Forkserver, command: Sequence[str], output: Path, processes: int):
        self.output = output
        self.log = output.with_suffix(".log")
        self.marker = output.with_suffix(".marker")
        self.processes: list[Process] = []
        self._server, self._command, self._count = server, command, processes

    def start(self) -> None:
        """Start the processes, as srun does: each is told its place by the environment."""
        environment = {"VIRTEX_REQUEUE_MARKER": str(self.marker)}
        if self._count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(self._count)}
        self.processes = [
            self._server.start(
                self._command,
                {
                    **environment,
                    **({"RANK": str(r), "LOCAL_RANK": str(r)} if self._count > 1 else {}),
                },
                self.log,
            )
            for r in range(self._count)
        ]

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            if not process.poll(seconds):
                raise TimeoutError(f"process {process.pid} still lives: {self.tail()}")
        return [process.code() for process in self.processes]

    def finish(self) -> None:
        """Start it, and see it end well."""
        self.start()
        if any(codes := self.wait()):
            raise RuntimeError(f"exit codes {codes}: {self.tail()}")

    @property
    def lives(self) -> bool:
        """Whether none of its processes has ended."""
        return not any(process.poll() for process in self.processes)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]

    def logged(self, text: str) -> int:
        """How often the log has it."""
        return self.log.read_text(errors="replace").count(text) if self.log.exists() else 0

    def records(self) -> list[dict]:
        """Of metrics.json, the whole lines."""
        try:
            lines = (self.output / "metrics.json").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def evaluations(self) -> dict[tuple[int, str], str]:
        """What was recorded last of each evaluation: (iteration, name) -> value, NaN included."""
        return {
            (record["iteration"], key): repr(value)
            for record in self.records()
            for key, value in record.items()
            if key.startswith(("val/", "bbox/", "segm/"))
        }

    def final(self) -> dict:
        """All that the last checkpoint holds, and the weights of the best and the averaged one."""
        last = torch.load(self.output / "model_final.pth", weights_only=True)
        for path in (self.output / "model_best.pth", self.output / "model_ema.pth"):
            if path.exists():
                last[path.stem] = torch.load(path, weights_only=True)["model"]
        return last

    def last_is_whole(self) -> bool:
        """Whether last_checkpoint, where there is one, names a file that can be read."""
        last = self.output / "last_checkpoint"
        if last.exists():
            torch.load(self.output / last.read_text(), weights_only=True)
        return True

    def being_written(self) -> bool:
        """Whether the temporary file of a checkpoint is there."""
        try:
            with os.scandir(self.output) as entries:
                return any(
                    entry.name.startswith(".tmp-model") and entry.name.endswith(".pth")
                    for entry in entries
                )
        except FileNotFoundError:
            return False
