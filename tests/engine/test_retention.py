import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    Retention,
    StateWriter,
    numbered_checkpoints,
)
from virtex_d2.engine.errors import InputError


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
