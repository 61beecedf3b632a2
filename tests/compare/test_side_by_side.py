"""Two processes on one comparison: each run is one process's, and what stops it is told."""

import json
from pathlib import Path

import pytest

from tests.compare.conftest import comparison
from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.lock import RunLock
from virtex_d2.studies.pipeline import runner
from virtex_d2.studies.pipeline.runner import StageFailedError

FIRST = "tiny-100pct-random-seed1"


@pytest.fixture
def two(project):
    """A comparison of two runs."""
    return lambda **options: comparison(project, seeds=(1,), fractions=(1.0,), **options)


def files(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.suffix == ".log"}


def fail(project: Path, code: int, words: str) -> None:
    """The next runs end with this exit code, and say so."""
    script = project / "tools" / "train_net.py"
    script.write_text(f"import sys; print({words!r}, file=sys.stderr); sys.exit({code})\n")


def test_a_second_one_of_all_runs_is_refused_and_starts_nothing(project, two):
    (project / "out").mkdir()
    first = RunLock(project / "out", pytest.fail, "--output")
    (project / "out" / "comparison.json").write_text('{"baseline": "random"}')
    first.acquire()
    try:
        with pytest.raises(
            InputError, match=r"^--output \S+/out: another run is writing it: process \d+ on .*"
        ):
            two().run()
        assert not (project / "out" / "logs").exists()
        two().run(only=1)  # a task of a job array
        assert len(two().finished()[0]) == 1
        assert len(two().commands()) == 2
        two().report()
    finally:
        first.release()
    two().run()
    assert two().finished()[1] == []


def test_tasks_of_a_job_array_run_beside_each_other_and_never_the_same_run(project, two):
    two().run(only=1)
    before = files(project / "out")
    other = RunLock(project / "out", pytest.fail, "--output", f"stages/{FIRST}")
    other.acquire()
    try:
        for only in (0, None):
            with pytest.raises(
                StageFailedError, match=f"/out, {FIRST}: another run is writing it: process"
            ) as caught:
                two().run(only=only)
            assert caught.value.code == EXIT_CODE
        assert files(project / "out") == before
    finally:
        other.release()
    two().run()
    assert [path.suffix for path in (project / "out" / "stages").iterdir()] == [".json"] * 2


def test_a_run_that_another_process_has_done_meanwhile_is_kept(project, two, monkeypatch, capsys):
    two().run()
    before = files(project / "out")
    monkeypatch.setattr(runner, "checked_marker", lambda *_: {})  # as it was before that
    two().run()
    assert files(project / "out") == before
    assert capsys.readouterr().out.count("done by another process meanwhile: kept") == 2


def test_a_comparison_that_was_taken_for_dead_ends_and_ends_its_runs(project, two, monkeypatch):
    monkeypatch.setattr(RunLock, "beat", 0.05)
    (project / "tools" / "train_net.py").write_text(
        "import time; from pathlib import Path; lock = Path('out/run.lock')\n"
        "other = lock.with_name('other'); other.write_text(lock.read_text())\n"
        "other.replace(lock); time.sleep(600)\n"
    )
    with pytest.raises(InputError, match="the lock run.lock was taken over by process"):
        two().run()
    marker = json.loads((project / "out" / "stages" / f"{FIRST}.json").read_text())
    assert not marker["complete"]


def test_what_a_run_refuses_would_be_refused_again_and_that_is_said(project, two):
    fail(project, 2, "error: DATASETS.TRAIN is empty")
    with pytest.raises(StageFailedError) as caught:
        two().run()
    message = str(caught.value)
    assert caught.value.code == EXIT_CODE
    assert "DATASETS.TRAIN is empty" in message
    assert "mend that first" in message
    assert "The same command goes on" not in message


def test_the_log_of_a_failure_is_that_of_the_last_process_alone(project, two):
    fail(project, 1, "the machine was switched off")
    with pytest.raises(StageFailedError, match="The same command goes on from here"):
        two().run()
    fail(project, 3, "no room left")
    with pytest.raises(StageFailedError) as caught:
        two().run()
    assert "no room left" in str(caught.value)
    assert "switched off" not in str(caught.value)
    assert "switched off" in (project / "out" / "logs" / f"{FIRST}.log").read_text()
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"overrides": ["SOLVER.BASE_LR", "0.5"]}, "SOLVER.BASE_LR: not given before, now 0.5"),
        ({"num_gpus": 2}, "--num-gpus: not given before, now 2"),
    ],
)
def test_another_option_than_that_of_runs_that_have_begun_is_named(project, two, options, told):
    two().run(only=0)
    with pytest.raises(InputError) as caught:
        two(**options).run(only=0)
    assert told in str(caught.value)
    assert "SOLVER.MAX_ITER" not in str(caught.value)
    assert "remove" not in str(caught.value)


def test_an_option_that_was_forgotten_is_named(project, two):
    two(overrides=["SOLVER.BASE_LR", "0.5"]).run(only=0)
    with pytest.raises(InputError, match=r"SOLVER\.BASE_LR: 0\.5 before, now not given\n"):
        two().finished()


def test_the_config_key_and_the_file_that_have_changed_are_named(project, two):
    two().run()
    (project / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 200}\nVERSION: 2\n")
    with pytest.raises(InputError) as caught:
        two().run()
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "config file configs/tiny.yaml: SOLVER.MAX_ITER: 100 before, now 200" in lines
    assert "config file configs/tiny.yaml: VERSION: not given before, now 2" in lines
    (project / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 100}\n")
    with open(project / "virtex.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"file virtex\.safetensors: its content has changed"):
        two().finished()


def test_of_a_marker_of_an_older_version_the_command_and_the_suspects_are_named(project, two):
    two().run(only=0)
    path = project / "out" / "stages" / f"{FIRST}.json"
    marker = json.loads(path.read_text())
    del marker["made_of"]
    path.write_text(json.dumps(marker))
    assert len(two().finished()[0]) == 1
    with pytest.raises(InputError, match=r"SOLVER\.BASE_LR: not given before, now 0\.5"):
        two(overrides=["SOLVER.BASE_LR", "0.5"]).finished()
    (project / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 200}\n")
    with pytest.raises(InputError, match=r"the content of one of configs/tiny\.yaml"):
        two().finished()


def test_runs_that_are_missing_in_a_report_are_named_on_the_terminal(project, two, capsys):
    two().run(only=0)
    capsys.readouterr()
    two().report()
    told = "Not finished: 1 of 2 runs:\n  tiny-100pct-virtex-seed1\n"
    assert capsys.readouterr().out == told
