"""A trainer that is asked to stop, and the one that goes on."""

import json
import os
import signal
import time
import weakref

import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from virtex_d2.engine import signals, stopping
from virtex_d2.engine.checkpointer import AtomicCheckpointer
from virtex_d2.engine.hooks import Evaluation, MetricsWriter, is_on_record
from virtex_d2.engine.stopping import StopHook, StoppableTrainer, remove_stale_marker
from virtex_d2.engine.unfinished import Unfinished

LAST = 6


class Told(HookBase):
    """Notes its iterations."""

    def __init__(self):
        self.iterations = []

    def after_step(self):
        self.iterations.append(self.trainer.iter)


class Trainer(StoppableTrainer):
    """Adds 1 to its weight; `stop_in` says where STOP appears: ("update" or "evaluation", n)."""

    def __init__(self, folder, stop_in=None):
        super().__init__()
        self.folder, self.stop_in = folder, stop_in
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.checkpointer = AtomicCheckpointer(self.model, str(folder), trainer=weakref.proxy(self))
        self.evaluated, self.following = [], Told()
        self.register_hooks(
            [
                StopHook(),
                hooks.PeriodicCheckpointer(self.checkpointer, 2),
                Evaluation(2, self.evaluate, str(folder)),
                self.following,
                MetricsWriter(CommonMetricPrinter(LAST), str(folder), 100),
            ]
        )

    def run_step(self):
        with torch.no_grad():
            self.model.weight += 1
        self._touch("update")

    def evaluate(self):
        self._touch("evaluation")
        for _ in stopping.abandonable(range(3)):
            pass
        self.evaluated.append(self.iter)
        return {"bbox": {"AP": self.model.weight.item()}}

    def _touch(self, place):
        if (place, self.iter) == self.stop_in:
            (self.folder / "STOP").touch()

    def run(self):
        stopping.watch(str(self.folder))
        if self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            self.start_iter = self.iter + 1
        self.train(self.start_iter, LAST)
        return self


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(stopping, "STOP_FILE_PERIOD", 0.0)
    monkeypatch.setattr("virtex_d2.engine.signals.ignore", lambda: None)
    monkeypatch.setenv("VIRTEX_REQUEUE_MARKER", str(tmp_path / "marker"))
    (tmp_path / "run").mkdir()
    yield
    stopping._watch = None


def evaluations(folder):
    records = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {r["iteration"]: r["bbox/AP"] for r in records if "bbox/AP" in r}


def files(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


@pytest.mark.parametrize(
    ("place", "iteration"),
    [*(("update", i) for i in range(LAST)), *(("evaluation", i) for i in range(1, LAST, 2))],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(place, iteration, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Unfinished) as end:
        Trainer(folder, (place, iteration)).run()
    assert end.value.code == 75
    marker = json.loads((tmp_path / "marker").read_text())
    assert (marker["iteration"], marker["max_iter"]) == (iteration + 1, LAST)
    assert marker["reason"] == "the file STOP"
    assert not marker["requeue"]  # who writes the file wants the run to stop
    assert marker["checkpoint"].endswith((folder / "last_checkpoint").read_text())
    assert not (folder / "STOP").exists()

    resumed = Trainer(folder).run()
    assert resumed.model.weight.item() == LAST
    assert evaluations(folder) == {1: 2.0, 3: 4.0, 5: 6.0}
    assert "model_final.pth" in files(folder)


def test_a_checkpoint_that_has_just_been_written_is_not_written_again(tmp_path, monkeypatch):
    saved = []
    save = AtomicCheckpointer.save

    def note(self, name, **kwargs):
        saved.append(name)
        save(self, name, **kwargs)

    monkeypatch.setattr(AtomicCheckpointer, "save", note)
    with pytest.raises(Unfinished):
        Trainer(tmp_path / "run", ("evaluation", 3)).run()
    assert saved == ["model_0000001", "model_0000003"]


def test_a_run_that_is_asked_before_its_first_iteration_saves_nothing(tmp_path):
    folder = tmp_path / "run"
    (folder / "STOP").touch()
    with pytest.raises(Unfinished):
        Trainer(folder).run()
    marker = json.loads((tmp_path / "marker").read_text())
    assert (marker["iteration"], marker["checkpoint"]) == (0, "")
    assert files(folder) == []
    assert Trainer(folder).run().model.weight.item() == LAST


@pytest.mark.parametrize("told", ["update", "before"])
def test_a_run_that_fell_back_names_the_checkpoint_that_is_resumed(told, tmp_path, caplog):
    """It once named the damaged one, where STOP came before anything was saved again."""
    folder = tmp_path / "run"
    with pytest.raises(Unfinished):
        Trainer(folder, ("update", 4)).run()
    assert files(folder) == [f"model_000000{i}.pth" for i in (1, 3, 4)]
    (folder / "model_0000004.pth").write_bytes(b"damaged")
    trainer = Trainer(folder, ("update", 4))
    if told == "before":
        (folder / "STOP").touch()
    with pytest.raises(Unfinished):
        trainer.run()
    expected = str(folder / {"before": "model_0000003.pth", "update": "model_0000004.pth"}[told])
    assert json.loads((tmp_path / "marker").read_text())["checkpoint"] == expected
    assert f"--resume goes on from {expected}." in caplog.text
    assert Trainer(folder).run().checkpointer.resumed_from == expected


def test_an_evaluation_that_a_kill_has_cost_is_made_up_for(tmp_path):
    folder = tmp_path / "run"

    class DyingTrainer(Trainer):
        def evaluate(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DyingTrainer(folder).run()
    assert files(folder) == ["model_0000001.pth"]
    resumed = Trainer(folder).run()
    assert resumed.evaluated == [1, 3, 5]
    assert evaluations(folder) == {1: 2.0, 3: 4.0, 5: 6.0}


def test_a_signal_ends_what_the_first_process_computes_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_listening", False)
    before = [signal.getsignal(number) for number in signals.STOPPING]

    class SlowTrainer(Trainer):
        def evaluate(self):
            return stopping.settled(self.compute)

        @signals.interruptible()
        def compute(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(60)

    try:
        signals.listen()
        start = time.monotonic()
        with pytest.raises(Unfinished):
            SlowTrainer(folder).run()
        assert time.monotonic() - start < 30  # of the 60
    finally:
        for number, handler in zip(signals.STOPPING, before):
            signal.signal(number, handler)
    assert json.loads((tmp_path / "marker").read_text())["reason"] == "USR1"
    signals._received.clear()
    assert Trainer(folder).run().evaluated == [1, 3, 5]


def test_an_evaluation_on_record_is_not_done_again(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Unfinished):
        Trainer(folder, ("update", 2)).run()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    assert is_on_record(str(folder), 1)
    assert not is_on_record(str(folder), 3)
    assert Trainer(folder).run().evaluated == [3, 5]


def test_a_finished_run_leaves_no_marker_and_a_new_one_removes_an_old_one(tmp_path):
    (tmp_path / "marker").touch()
    remove_stale_marker()
    Trainer(tmp_path / "run").run()
    assert not (tmp_path / "marker").exists()


def recorded(folder):
    return [json.loads(line)["iteration"] for line in open(folder / "metrics.json")]


@pytest.mark.parametrize("back", ["model_0000001.pth", "model_0000003.pth"])
def test_what_was_recorded_after_the_checkpoint_is_taken_back(tmp_path, back):
    folder = tmp_path / "run"
    with pytest.raises(Unfinished):
        Trainer(folder, ("update", 4)).run()
    (folder / "last_checkpoint").write_text(back)
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 4, "loss": 1.0}\n{"iterat')  # killed while it wrote
    Trainer(folder).run()
    assert sorted(set(recorded(folder))) == recorded(folder)
    assert evaluations(folder) == {1: 2.0, 3: 4.0, 5: 6.0}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("bbox/AP")] == [1, 3, 5]


def test_without_a_checkpoint_all_is_taken_back(tmp_path):
    folder = tmp_path / "run"
    (folder / "metrics.json").write_text('{"iteration": 0}\n{"iteration": 1, "bbox/AP": 9}\n')
    Trainer(folder).run()
    assert evaluations(folder) == {1: 2.0, 3: 4.0, 5: 6.0}


def test_a_finished_run_is_known_by_its_records(tmp_path):
    folder = tmp_path / "run"
    finished = Trainer(folder).run()
    finished.start_iter = LAST
    assert finished.is_finished()
    before = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(
        before.replace(f'"iteration": {LAST - 1}', '"iteration": 0')
    )
    assert not finished.is_finished()  # its last evaluation is owed
