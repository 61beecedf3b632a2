"""What is written beside training is what it was when it was saved, and no error is lost."""

import logging
import textwrap
import threading
from collections import OrderedDict

import pytest
import torch

from virtex_d2.engine.checkpointer import AtomicCheckpointer, Snapshot, StateWriter, num_bytes
from virtex_d2.engine.hooks import PeriodicCheckpointer


class Net(torch.nn.Module):
    """With tied weights, a buffer, a view of a larger tensor and a bfloat16 parameter."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("view", torch.arange(10.0)[2:7:2])


def adam_after(steps):
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(steps):
        (net.last(net.norm(net.first(torch.randn(6, 4)))).sum() + net.scale.sum()).backward()
        optimizer.step()
    return net, optimizer


def test_the_file_is_the_same_byte_for_byte_as_one_that_is_written_in_place(tmp_path):
    net, optimizer = adam_after(2)
    for name, writer in (("in_place", StateWriter()), ("beside", StateWriter(background=True))):
        folder = tmp_path / name
        folder.mkdir()
        checkpointer = AtomicCheckpointer(net, str(folder), writer=writer, optimizer=optimizer)
        checkpointer.save("model_0000001", iteration=1)
        checkpointer.wait()
    one, other = (tmp_path / name / "model_0000001.pth" for name in ("in_place", "beside"))
    assert one.read_bytes() == other.read_bytes()


def test_training_that_goes_on_changes_nothing_in_what_is_written(tmp_path):
    net, optimizer = adam_after(2)
    writer, may_write = StateWriter(background=True), threading.Event()
    expected = Snapshot().take({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    written = []

    def write_late(state):
        may_write.wait(60)
        torch.save(state, tmp_path / "late.pth")
        written.append(threading.current_thread())

    writer.write({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, write_late)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    for state in optimizer.state.values():
        state["exp_avg"].add_(1)
        state["step"].add_(1)
    optimizer.param_groups[0]["lr"] = 9.0
    may_write.set()
    writer.wait()
    assert written != [threading.main_thread()]
    found = torch.load(tmp_path / "late.pth", weights_only=True)
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1
    for name, tensor in expected["net"].items():
        assert torch.equal(found["net"][name], tensor), name
    for number, state in expected["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(found["optimizer"]["state"][number][key], tensor), key


def test_a_snapshot_shares_memory_as_its_original_and_uses_that_of_the_one_before():
    net, _ = adam_after(1)
    snapshot = Snapshot()
    first = snapshot.take(net.state_dict())
    assert first["first.weight"].data_ptr() == first["last.weight"].data_ptr()
    assert first["first.weight"].data_ptr() != net.first.weight.data_ptr()
    assert first["view"].stride() == (2,)
    assert num_bytes(first) == num_bytes(net.state_dict())
    places = {tensor.untyped_storage().data_ptr() for tensor in first.values()}
    net.first.weight.data.fill_(5.0)
    second = snapshot.take(net.state_dict())
    assert {tensor.untyped_storage().data_ptr() for tensor in second.values()} == places
    assert torch.all(second["last.weight"] == 5.0)


def test_a_snapshot_keeps_what_containers_carry():
    """A state dict's versions of its modules decide how it is loaded."""
    net, _ = adam_after(0)
    state = net.state_dict()
    copied = Snapshot().take({"model": state, "rest": [(1, "a"), {"b": None}]})
    assert isinstance(copied["model"], OrderedDict)
    assert copied["model"]._metadata == state._metadata
    assert copied["rest"] == [(1, "a"), {"b": None}]


def test_a_second_save_waits_for_the_first_and_errors_come_with_the_next_call():
    writer, may_end, order = StateWriter(background=True), threading.Event(), []

    def fail(state):
        may_end.wait(60)
        order.append("first")
        raise OSError("the disk has burnt")

    writer.write({}, fail)
    writer.check()  # nothing yet
    threading.Timer(0.1, may_end.set).start()
    with pytest.raises(OSError, match="burnt"):
        writer.write({}, lambda _: order.append("second"))
    assert order == ["first"]
    writer.wait()  # it is told once
    writer.write({}, lambda _: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]


class Trainer:
    """What a hook sees of a training of so many iterations."""

    def __init__(self, hook, iterations):
        self.iter, self.start_iter, self.max_iter = 0, 0, iterations
        self.hook, hook.trainer = hook, self

    def train(self, after_iteration=lambda iteration: None):
        self.hook.before_train()
        try:
            for iteration in range(self.max_iter):
                self.iter = iteration
                after_iteration(iteration)
                self.hook.after_step()
        finally:  # as detectron2's
            self.hook.after_train()


@pytest.fixture
def run(tmp_path):
    net, optimizer = adam_after(1)
    checkpointer = AtomicCheckpointer(net, str(tmp_path), writer=StateWriter(background=True))
    return Trainer(PeriodicCheckpointer(checkpointer, 2, optimizer), 6), checkpointer, tmp_path


def test_memory_for_the_copy_is_taken_in_the_first_iteration_and_not_again(run, monkeypatch):
    trainer, *_ = run
    taken = []
    take = Snapshot.take

    def watched(snapshot, state):
        copied = take(snapshot, state)
        places = {s.data_ptr() for s in snapshot._storages if s.nbytes()}
        taken.append((trainer.iter, places))
        return copied

    monkeypatch.setattr(Snapshot, "take", watched)
    trainer.train()
    assert [iteration for iteration, _ in taken][:2] == [0, 1]  # the first checkpoint is of 1
    assert all(places == taken[0][1] for _, places in taken)


def test_training_ends_when_its_last_checkpoint_is_on_disk(run):
    trainer, checkpointer, folder = run
    write, begun = checkpointer.tag_last_checkpoint, []

    def slow(name):
        begun.append(name)
        threading.Event().wait(0.1)
        write(name)

    checkpointer.tag_last_checkpoint = slow
    trainer.train()
    assert begun[-1] == "model_final.pth"
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_a_write_that_fails_ends_training_within_an_iteration(run):
    trainer, checkpointer, _ = run
    seen = []

    def after_iteration(iteration):
        seen.append(iteration)
        if iteration == 1:
            checkpointer.tag_last_checkpoint = lambda name: 1 / 0
        if iteration == 2:
            checkpointer.writer._thread.join()

    with pytest.raises(ZeroDivisionError):
        trainer.train(after_iteration)
    assert seen == [0, 1, 2]


def test_another_error_of_training_is_not_hidden_by_one_of_the_writer(run, caplog):
    trainer, checkpointer, _ = run
    checkpointer.tag_last_checkpoint = lambda name: 1 / 0

    def after_iteration(iteration):
        if iteration == 2:
            raise KeyError("the first error")

    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="the first error"):
        trainer.train(after_iteration)
    assert "division by zero" in caplog.text


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "1 / 0"])
def test_a_process_that_ends_finishes_what_it_has_begun_to_write(tmp_path, run_python, end):
    script = textwrap.dedent("""
        import sys, time
        import torch
        from virtex_d2.engine.checkpointer import StateWriter
        from virtex_d2.engine.checkpointer import AtomicCheckpointer

        writer = StateWriter(background=True)
        checkpointer = AtomicCheckpointer(torch.nn.Linear(3, 2), sys.argv[1], writer=writer)
        tag = checkpointer.tag_last_checkpoint
        checkpointer.tag_last_checkpoint = lambda name: (time.sleep(0.3), tag(name))
        checkpointer.save("model_0000001", iteration=1)
    """)
    done = run_python("-c", script + end, tmp_path)
    assert done.returncode == {"pass": 0, "1 / 0": 1}.get(end, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
    ]
