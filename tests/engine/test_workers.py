"""Loader workers that cannot hand over what they have, and waits for them."""

import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing import util

import pytest
import torch

from virtex_d2.engine import signals, workers
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.workers import batches_of, start_worker


class Unpicklable:
    """A batch whose handing over fails as `error` says."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def loader(samples, collate=list):
    return torch.utils.data.DataLoader(
        samples,
        num_workers=1,
        collate_fn=collate,
        worker_init_fn=start_worker,
        timeout=120,  # for the test: of a run it is without
    )


@pytest.fixture
def temporary_folder(monkeypatch, tmp_path):
    """`use(length)` makes TMPDIR a folder with a name of that length, before workers start."""

    def use(length):
        folder = str(tmp_path) + "/" + "j" * max(1, length - len(str(tmp_path)) - 1)
        os.makedirs(folder, exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
        return folder

    yield use
    multiprocessing.current_process()._config.pop("tempdir", None)


@pytest.mark.parametrize("length", [90, 107, 200])
def test_workers_of_a_long_tmpdir_meet_in_a_short_one(temporary_folder, length):
    folder = temporary_folder(length)
    batches = list(batches_of(lambda: iter(loader([torch.ones(3), torch.zeros(3)], torch.stack))))
    assert [batch.sum().item() for batch in batches] == [3, 0]
    assert len(util.get_temp_dir()) < 60
    assert tempfile.gettempdir() == folder  # for all else it stays


def test_where_no_short_folder_can_be_written_the_run_ends_before_the_first_batch(
    temporary_folder, monkeypatch
):
    folder = temporary_folder(100)
    monkeypatch.setattr(workers, "_SHORT_FOLDERS", ("/no-such-folder",))
    with pytest.raises(InputError, match=f"TMPDIR {folder} has 100 characters.*shorter TMPDIR"):
        next(batches_of(lambda: pytest.fail("workers were started")))


@pytest.mark.parametrize(
    "error",
    [
        OSError("AF_UNIX path too long"),
        RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
        OSError(24, "Too many open files"),
        ValueError("of another kind"),
    ],
)
def test_what_a_worker_cannot_hand_over_ends_the_run_with_its_reason(error):
    with pytest.raises(InputError) as caught:
        list(batches_of(lambda: iter(loader([Unpicklable(error)]))))
    assert f"cannot hand its batch over: {type(error).__name__}: {error}." in str(caught.value)


@pytest.fixture
def listening(monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_listening", False)
    numbers = (*signals.STOPPING, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    signals.listen()
    yield
    assert signal.alarm(0) == 0, "an alarm was left"
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOPPING)
@pytest.mark.parametrize("early", [True, False])
def test_a_signal_ends_a_wait_without_an_end(listening, monkeypatch, number, early):
    monkeypatch.setattr(workers, "PATIENCE", 1)

    def stalled():
        yield "the first"
        if not early:
            os.kill(os.getpid(), number)
        time.sleep(600)

    batches = batches_of(stalled)
    assert next(batches) == "the first"
    if early:
        os.kill(os.getpid(), number)
    name = signal.Signals(number).name.removeprefix("SIG")
    with pytest.raises(InputError, match=f"{name} has come while the next batch.* 1 s no batch"):
        next(batches)


def test_a_batch_that_still_comes_is_handed_out_for_the_run_to_stop_behind_it(listening):
    def slow():
        for _ in range(3):  # schedulers repeat it
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        yield "a batch"

    assert list(batches_of(slow)) == ["a batch"]
    assert signals.received() == "USR1"
