import json
import os
import pickle
import signal
import textwrap

import numpy as np
import pytest
import torch
from fvcore.common.checkpoint import PeriodicCheckpointer

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    StateWriter,
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
    files = checkpointer.get_all_checkpoint_files()
    assert sorted(os.path.basename(file) for file in files) == names


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
