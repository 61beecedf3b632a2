"""A last checkpoint that is damaged or missing falls back to the one before, and says so."""

import logging

import pytest
import torch

from virtex_d2.engine.checkpointer import (
    AtomicCheckpointer,
    AtomicDetectionCheckpointer,
    has_checkpoint,
    last_whole_checkpoint,
)
from virtex_d2.engine.errors import InputError

KINDS = (AtomicCheckpointer, AtomicDetectionCheckpointer)


def save(folder, *names):
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
    save(tmp_path, *NAMES)
    harm(tmp_path / "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path, kind) == 2
    (message,) = [r.getMessage() for r in caplog.records if "LAST CHECKPOINT" in r.getMessage()]
    assert f"{tmp_path}/model_0000005.pth: " in message
    assert f"goes on from an older one, {tmp_path}/model_0000003.pth" in message


def test_several_harmed_ones_are_all_named(tmp_path, caplog):
    save(tmp_path, *NAMES, "model_final")
    for name in ("model_final", "model_0000005", "model_0000003"):
        flip(tmp_path / f"{name}.pth")
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 1
    for name in ("model_final", "model_0000005", "model_0000003"):
        assert f"{tmp_path}/{name}.pth: its content is not what was written" in caplog.text


def test_whole_ones_resume_without_a_word(tmp_path, caplog):
    save(tmp_path, *NAMES)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 3
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", ["", "\n", "\0\0\0\0"])
def test_a_last_checkpoint_that_names_nothing_falls_back_to_the_newest(tmp_path, name, caplog):
    save(tmp_path, *NAMES)
    (tmp_path / "last_checkpoint").write_text(name)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 3
    assert "last_checkpoint: names no file" in caplog.text


def test_a_kill_before_the_first_name_was_written_loses_nothing(tmp_path, caplog):
    save(tmp_path, NAMES[0])
    (tmp_path / "last_checkpoint").unlink()
    assert has_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 1
    assert "last_checkpoint: there is no such file" in caplog.text


def test_other_files_are_no_checkpoint_to_go_on_from(tmp_path):
    save(tmp_path, "model_best")
    (tmp_path / "last_checkpoint").unlink()
    assert not has_checkpoint(tmp_path)


def test_later_ones_than_the_last_are_not_taken(tmp_path):
    """Of a part of the run that is being repeated, or that its user has gone back behind."""
    save(tmp_path, *NAMES)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert resumed(tmp_path) == 2
    (tmp_path / "model_0000003.pth").unlink()
    assert resumed(tmp_path) == 1


def test_where_none_is_whole_the_run_stops_and_does_not_begin_anew(tmp_path):
    save(tmp_path, *NAMES)
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
    save(tmp_path, *NAMES)
    flip(tmp_path / "model_0000005.pth")
    assert last_whole_checkpoint(tmp_path, tell=False) == f"{tmp_path}/model_0000003.pth"
