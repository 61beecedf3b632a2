"""What a run has on record, in its metrics.json; and how it is written."""

import json
import os
from collections.abc import Iterator

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter

from virtex_d2.engine.files import atomic_path

# Recorded with each evaluation's results: how long it took. Tells that they are complete.
RECORD = "eval_seconds"


class MetricsWriter(hooks.PeriodicWriter):
    """detectron2's, which also writes at once what an evaluation has found.

    Else a run that is killed before its next period would have evaluated for nothing. What an
    earlier part of the run has recorded after the checkpoint from which this one goes on, it takes
    back before the first iteration, so that each one is on record once.

    Args:
        printer: writes to the log.
        folder: OUTPUT_DIR, for metrics.json and TensorBoard's events.
        period: in iterations.
    """

    def __init__(self, printer: EventWriter, folder: str, period: int):
        super().__init__([printer], period)
        self._folder = folder

    def before_train(self) -> None:
        start, path = self.trainer.start_iter, os.path.join(self._folder, "metrics.json")
        cut_records(path, start)
        self._writers += [
            JSONWriter(path),
            TensorboardXWriter(self._folder, purge_step=start),
        ]

    def after_step(self) -> None:
        if not was_evaluated(self.trainer.storage, self.trainer.iter):
            super().after_step()
            return
        for writer in self._writers:
            writer.write()


def was_evaluated(storage: EventStorage, iteration: int) -> bool:
    """Whether this process has recorded an evaluation of the iteration."""
    return storage.latest().get(RECORD, (0.0, -1))[1] == iteration


def is_on_record(folder: str, iteration: int) -> bool:
    """Whether OUTPUT_DIR's metrics.json has an evaluation of the iteration; asks the first process.

    To be called in all processes.
    """
    found = False
    if comm.is_main_process():
        found = any(
            record.get("iteration") == iteration and RECORD in record
            for record in _records(os.path.join(folder, "metrics.json"))
        )
    return comm.all_gather(found)[0]


def _records(path: str) -> Iterator[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError:  # none was written, so none is there
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that was killed while it wrote
        if isinstance(record, dict):
            yield record


def cut_records(path: str, start: int) -> None:
    """Take out of a metrics.json, which need not exist, the records from `start` on."""
    if not os.path.exists(path):
        return
    kept = [record for record in _records(path) if record.get("iteration", -1) < start]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in kept)
