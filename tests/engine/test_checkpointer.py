import json
import logging
import os
import pickle
import signal
import textwrap

import numpy as np
import pytest
import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    Retention,
    StateWriter,
    has_checkpoint,
    last_whole_checkpoint,
    numbered_checkpoints,
)
from virtex_d2.engine.errors import InputError

KINDS = (AtomicCheckpointer, AtomicDetectionCheckpointer)


def model_and_optimizer(value=0.0):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer):
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", [False, True])
def test_a_run_resumes_with_its_model_its_optimizer_and_its_iteration(tmp_path, kind, background):
    model, optimizer = model_and_optimizer()
    train(model, optimizer)
    writer = StateWriter(background)
    saving = kind(model, str(tmp_path), writer=writer, optimizer=optimizer)
    saving.save("model_0000006", iteration=6)
    saving.wait()

    resumed, its_optimizer = model_and_optimizer(9.0)
    checkpointer = kind(resumed, str(tmp_path), optimizer=its_optimizer)
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest["iteration"] == 6
    assert torch.equal(resumed.weight, model.weight)
    momenta = [state["momentum_buffer"] for state in its_optimizer.state.values()]
    assert len(momenta) == 2
    assert torch.equal(momenta[0], optimizer.state[model.weight]["momentum_buffer"])
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000006.pth"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_resume_only_the_weights_are_loaded(tmp_path, kind):
    model, optimizer = model_and_optimizer()
    train(model, optimizer)
    kind(model, str(tmp_path), optimizer=optimizer).save("model_final")
    other, its_optimizer = model_and_optimizer(9.0)
    path = str(tmp_path / "model_final.pth")
    kind(other, str(tmp_path / "new"), optimizer=its_optimizer).resume_or_load(path, resume=True)
    assert torch.equal(other.weight, model.weight)
    assert not its_optimizer.state


def test_resuming_an_empty_folder_starts_afresh(tmp_path):
    model, _ = model_and_optimizer(9.0)
    assert AtomicCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True) == {}
    assert torch.all(model.weight == 9.0)


def test_periodic_checkpoints_keep_the_last_ones(tmp_path):
    model, _ = model_and_optimizer()
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=2, max_iter=7, max_to_keep=2)
    for iteration in range(7):
        periodic.step(iteration)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    names = ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == names


def test_a_process_that_may_not_save_saves_nothing(tmp_path):
    model, _ = model_and_optimizer()
    AtomicCheckpointer(model, str(tmp_path), save_to_disk=False).save("model_final")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("moment", ["while the tensors are written", "before the name is written"])
def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(
    tmp_path, run_python, moment, background
):
    script = textwrap.dedent("""
        import os, signal, sys, time
        import torch
        from virtex_d2.engine.checkpointer import StateWriter
        from virtex_d2.engine.checkpointer import AtomicCheckpointer

        folder, moment, background = sys.argv[1:]
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, 1.0)
        writer = StateWriter(background == "True")
        checkpointer = AtomicCheckpointer(model, folder, writer=writer)
        checkpointer.save("model_0000001", iteration=1)
        checkpointer.wait()

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        def write_half_and_die(data, file):
            file.write(b"PK half a checkpoint")
            file.flush()
            die()

        if moment.startswith("while"):
            torch.save = write_half_and_die
        else:
            checkpointer.tag_last_checkpoint = die
        torch.nn.init.constant_(model.weight, 2.0)
        checkpointer.save("model_0000002", iteration=2)
        time.sleep(60)
    """)
    done = run_python("-c", script, tmp_path, moment, background)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert (".tmp" in left) == moment.startswith("while")

    model, _ = model_and_optimizer()
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert torch.all(model.weight == 1.0)
    checkpointer.save("model_0000002")  # and what the kill left is cleared away
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_0000002.pth",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_time_during_saves_leaves_a_checkpoint_that_loads(
    tmp_path, run_python, background
):
    """Guards against checkpoints that are written in place, as detectron2's own are."""
    script = textwrap.dedent("""
        import os, signal, sys, threading
        import torch
        from virtex_d2.engine.checkpointer import StateWriter
        from virtex_d2.engine.checkpointer import AtomicCheckpointer

        model = torch.nn.Linear(1000, 1000)
        writer = StateWriter(sys.argv[3] == "True")
        checkpointer = AtomicCheckpointer(model, sys.argv[1], writer=writer)
        checkpointer.save("model_0000000", iteration=0)
        checkpointer.wait()
        threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
        for iteration in range(1, 100000):
            torch.nn.init.constant_(model.weight, iteration)
            checkpointer.save(f"model_{iteration % 2:07d}", iteration=iteration)
    """)
    for delay in (0.05, 0.061, 0.083):
        folder = tmp_path / str(delay)
        done = run_python("-c", script, folder, delay, background)
        assert done.returncode == -signal.SIGKILL, done.stderr
        model = torch.nn.Linear(1000, 1000)
        state = AtomicCheckpointer(model, str(folder)).resume_or_load("", resume=True)
        if state["iteration"]:
            assert torch.all(model.weight == state["iteration"])


class Touch:
    """Pickles into a call that makes a folder: what a malicious checkpoint would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path, kind, suffix):
    model, _ = model_and_optimizer(9.0)
    content = {"model": {"weight": torch.ones(2, 3)}, "__author__": "x", "a": Touch(tmp_path / "t")}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="model"):
        kind(model, "").load(str(path))
    assert not (tmp_path / "t").exists()
    assert torch.all(model.weight == 9.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_checkpoint_is_named(tmp_path, kind):
    model, _ = model_and_optimizer()
    with pytest.raises(InputError, match=r"absent\.pth: expected a checkpoint, found no file"):
        kind(model, "").load(str(tmp_path / "absent.pth"))
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    with pytest.raises(InputError, match=r"nothing to resume from: .*gone\.pth: there is no such"):
        kind(model, str(tmp_path)).resume_or_load("", resume=True)


def test_a_bare_state_dict_is_taken_for_the_model(tmp_path):
    model, _ = model_and_optimizer()
    torch.save({"weight": torch.full((2, 3), 5.0)}, tmp_path / "bare.pth")
    AtomicDetectionCheckpointer(model, "").load(str(tmp_path / "bare.pth"))
    assert torch.all(model.weight == 5.0)


def test_a_model_zoo_file_of_numpy_arrays_is_loaded(tmp_path):
    model, _ = model_and_optimizer()
    weights = {"weight": np.full((2, 3), 5, np.float32), "bias": np.ones(2, np.float32)}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "test"}))
    AtomicDetectionCheckpointer(model, "").load(str(path))
    assert torch.all(model.weight == 5.0)
    assert torch.all(model.bias == 1.0)


@pytest.mark.parametrize("nested", [True, False])
def test_a_caffe2_file_is_read_as_detectron2_reads_it(tmp_path, nested):
    """Flat or under "blobs"; names converted, momentum left out."""
    from detectron2.checkpoint import DetectionCheckpointer

    blobs = {
        "conv1_w": np.ones((2, 3, 1, 1), np.float32),
        "conv1_w_momentum": np.zeros((2, 3, 1, 1), np.float32),
    }
    path = tmp_path / "caffe2.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs} if nested else blobs))
    model = torch.nn.Linear(1, 1)
    ours = AtomicDetectionCheckpointer(model)._load_file(str(path))
    theirs = DetectionCheckpointer(model)._load_file(str(path))
    assert ours.keys() == theirs.keys()
    assert ours["model"].keys() == theirs["model"].keys() == {"conv1_w"}
    assert {key: ours[key] for key in ours if key != "model"} == {
        key: theirs[key] for key in theirs if key != "model"
    }


def test_checkpoints_of_stock_detectron2_are_interchangeable(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    model, _ = model_and_optimizer(3.0)
    AtomicDetectionCheckpointer(model, str(tmp_path)).save("ours", iteration=1)
    other, _ = model_and_optimizer()
    DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert torch.all(other.weight == 3.0)
    DetectionCheckpointer(model, str(tmp_path)).save("theirs", iteration=2)
    another, _ = model_and_optimizer()
    state = AtomicDetectionCheckpointer(another, str(tmp_path)).resume_or_load("", resume=True)
    assert state["iteration"] == 2
    assert json.dumps(state) == '{"iteration": 2}'
    assert torch.all(another.weight == 3.0)


def checkpointer(folder, retention, background=False):
    model = torch.nn.Linear(1, 1)
    return AtomicCheckpointer(
        model, str(folder), writer=StateWriter(background), retention=retention
    )


def numbers(folder):
    return [number + 1 for number in numbered_checkpoints(folder)]


def save(folder, retention, *iterations, background=False):
    """As one process of a run; iterations count from 1."""
    saving = checkpointer(folder, retention, background)
    for done in iterations:
        saving.save(f"model_{done - 1:07d}", iteration=done - 1)
    saving.wait()


@pytest.mark.parametrize("background", [False, True])
def test_the_last_ones_and_one_of_every_so_many_iterations_stay(tmp_path, background):
    save(tmp_path, Retention(2, 10), *range(2, 32, 2), background=background)
    assert numbers(tmp_path) == [10, 20, 28, 30]


def test_a_restart_does_not_forget_what_there_is(tmp_path):
    """fvcore's own `max_to_keep` would leave two more at each of these."""
    for first in range(2, 32, 6):
        save(tmp_path, Retention(2, 10), first, first + 2, first + 4)
    assert numbers(tmp_path) == [10, 20, 28, 30]


def test_files_of_other_names_are_never_removed(tmp_path):
    others = ["model_final.pth", "model_best.pth", "model_ema.pth", "model_7.pth", "best_0000002"]
    others += ["model_0000002.pth.old", "xmodel_0000002.pth", "model_0000002.safetensors"]
    for name in others:
        (tmp_path / name).touch()
    save(tmp_path, Retention(1), 2, 4, 6)
    assert numbers(tmp_path) == [6]
    assert all((tmp_path / name).exists() for name in others)


def test_by_default_all_stay(tmp_path):
    save(tmp_path, None, 2, 4, 6)
    save(tmp_path, Retention(0, 4), 8)
    assert numbers(tmp_path) == [2, 4, 6, 8]


def test_the_one_that_was_fallen_back_to_stays_while_later_ones_are_repeated(tmp_path):
    """8 and 10 are damaged: the run goes on from 6."""
    save(tmp_path, Retention(3), 6, 8, 10)
    save(tmp_path, Retention(2), 7)
    assert numbers(tmp_path) == [6, 7, 8, 10]


def test_the_final_checkpoint_removes_none(tmp_path):
    saving = checkpointer(tmp_path, Retention(2))
    for name in ("model_0000001", "model_0000003", "model_final"):
        saving.save(name)
    assert numbers(tmp_path) == [2, 4]


@given(
    last=st.integers(1, 4),
    every=st.integers(0, 30),
    period=st.integers(1, 9),
    stops=st.lists(st.integers(0, 120), max_size=5),
)
def test_whatever_the_periods_the_newest_stay_and_no_gap_is_long(last, every, period, stops):
    """Checkpoints each period, and where the run was stopped."""
    retention = Retention(last, every)
    saved = sorted({*range(period, 121, period), *(stop for stop in stops if stop)})
    kept: list[int] = []
    for done in saved:
        kept.append(done - 1)
        for number in retention.removable(kept, done - 1):
            kept.remove(number)
    kept = [number + 1 for number in kept]
    assert kept[-last:] == saved[-last:]
    if not every:
        assert kept == saved[-last:]
    else:
        firsts = [min(d for d in saved if d // every == n) for n in {d // every for d in saved}]
        assert kept == sorted({*saved[-last:], *(first for first in firsts if first >= every)})


@given(st.integers(0, 4), st.integers(0, 30), st.integers(1, 9), st.integers(0, 60))
def test_there_are_never_more_than_announced(last, every, period, first):
    retention, kept, most = Retention(last, every), [], 0
    for done in range(first + 1, 101):
        if done % period == 0:
            kept.append(done - 1)
            most = max(most, len(kept))
            for number in retention.removable(kept, done - 1):
                kept.remove(number)
    count = retention.count(first, 100, period)
    assert most <= count <= 100 // period - first // period
    assert every or count == most


@pytest.mark.parametrize(("last", "every"), [(-1, 0), (2, -5)])
def test_negative_numbers_are_refused(last, every):
    with pytest.raises(InputError, match=r"SOLVER\.CHECKPOINT_KEEP_LAST is"):
        Retention(last, every)


def save_some(folder, *names):
    model = torch.nn.Linear(3, 2)
    checkpointer = AtomicCheckpointer(model, str(folder))
    for number, name in enumerate(names, 1):
        torch.nn.init.constant_(model.weight, number)
        checkpointer.save(name, number=number)


def resumed(folder, kind=AtomicCheckpointer):
    model = torch.nn.Linear(3, 2)
    state = kind(model, str(folder)).resume_or_load("", resume=True)
    assert torch.all(model.weight == state["number"])
    return state["number"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    """What a file system may leave of a file after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path):
    path.unlink()


NAMES = ("model_0000001", "model_0000003", "model_0000005")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", [flip, cut, empty, zero, remove])
def test_a_harmed_last_checkpoint_falls_back_to_the_one_before(tmp_path, kind, harm, caplog):
    save_some(tmp_path, *NAMES)
    harm(tmp_path / "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path, kind) == 2
    (message,) = [r.getMessage() for r in caplog.records if "LAST CHECKPOINT" in r.getMessage()]
    assert f"{tmp_path}/model_0000005.pth: " in message
    assert f"goes on from an older one, {tmp_path}/model_0000003.pth" in message


def test_several_harmed_ones_are_all_named(tmp_path, caplog):
    save_some(tmp_path, *NAMES, "model_final")
    for name in ("model_final", "model_0000005", "model_0000003"):
        flip(tmp_path / f"{name}.pth")
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 1
    for name in ("model_final", "model_0000005", "model_0000003"):
        assert f"{tmp_path}/{name}.pth: its content is not what was written" in caplog.text


def test_whole_ones_resume_without_a_word(tmp_path, caplog):
    save_some(tmp_path, *NAMES)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 3
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", ["", "\n", "\0\0\0\0"])
def test_a_last_checkpoint_that_names_nothing_falls_back_to_the_newest(tmp_path, name, caplog):
    save_some(tmp_path, *NAMES)
    (tmp_path / "last_checkpoint").write_text(name)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 3
    assert "last_checkpoint: names no file" in caplog.text


def test_a_kill_before_the_first_name_was_written_loses_nothing(tmp_path, caplog):
    save_some(tmp_path, NAMES[0])
    (tmp_path / "last_checkpoint").unlink()
    assert has_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 1
    assert "last_checkpoint: there is no such file" in caplog.text


def test_other_files_are_no_checkpoint_to_go_on_from(tmp_path):
    save_some(tmp_path, "model_best")
    (tmp_path / "last_checkpoint").unlink()
    assert not has_checkpoint(tmp_path)


def test_later_ones_than_the_last_are_not_taken(tmp_path):
    """Of a part of the run that is being repeated, or that its user has gone back behind."""
    save_some(tmp_path, *NAMES)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert resumed(tmp_path) == 2
    (tmp_path / "model_0000003.pth").unlink()
    assert resumed(tmp_path) == 1


def test_where_none_is_whole_the_run_stops_and_does_not_begin_anew(tmp_path):
    save_some(tmp_path, *NAMES)
    for path in tmp_path.glob("*.pth"):
        flip(path)
    with pytest.raises(InputError, match="nothing to resume from") as error:
        resumed(tmp_path)
    assert all(name in str(error.value) for name in NAMES)


def test_a_checkpoint_of_another_run_is_refused_and_no_older_one_taken(tmp_path):
    """Only damage falls back: what does not fit is the user's to decide."""

    class Identity:
        def state_dict(self):
            return {"run": 1}

        def load_state_dict(self, state):
            raise InputError("of another run")

    model = torch.nn.Linear(3, 2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path), run=Identity())
    for name in NAMES:
        checkpointer.save(name)
    with pytest.raises(InputError, match="of another run"):
        checkpointer.resume_or_load("", resume=True)


def test_the_path_alone_can_be_asked_for(tmp_path):
    save_some(tmp_path, *NAMES)
    flip(tmp_path / "model_0000005.pth")
    assert last_whole_checkpoint(tmp_path, tell=False) == f"{tmp_path}/model_0000003.pth"
