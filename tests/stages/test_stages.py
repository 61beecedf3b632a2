"""Stages as processes: done once, continued, side by side, and failing loudly."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.engine.lock import RunLock
from virtex_d2.studies import stages
from virtex_d2.studies.stages import (
    Stage,
    StageFailedError,
    clock,
    elapsed,
    run_stages,
)

# Says what it is given, and fails where a file beside the script says with which code.
SCRIPT = """\
import pathlib, sys
name = sys.argv[-1]
print("resumed" if "--resume" in sys.argv else "new")
trap = pathlib.Path(f"fail-{name}")
if trap.exists():
    print("the disk is on fire")
    sys.exit(int(trap.read_text()))
pathlib.Path(name).mkdir(exist_ok=True)
pathlib.Path(name, "metrics.json").touch()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "tool.py").write_text(SCRIPT)
    (tmp_path / "root" / "base.yaml").write_text("SOLVER: {MAX_ITER: 100, STEPS: '(70, 90)'}\n")
    (tmp_path / "root" / "tiny.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 50}\n")
    return tmp_path / "root"


def stage(name: str, *words: str, **options) -> Stage:
    return Stage(name, f"The {name}", ("tool.py", *words, "NAME", name), name, **options)


def two(**options) -> list[Stage]:
    return [stage(name, label=name, group="both", **options) for name in ("one", "two")]


def markers(root: Path) -> dict[str, bool]:
    found = (root / "out" / "stages").glob("*.json")
    return {path.stem: json.loads(path.read_text())["complete"] for path in found}


def log(root: Path, name: str) -> str:
    return (root / "out" / "logs" / f"{name}.log").read_text()


def test_what_is_complete_is_kept_and_what_is_new_is_run(root, capsys):
    run_stages(two(), root, root / "out")
    assert capsys.readouterr().out.count("finished in") == 2
    run_stages([*two(), stage("three")], root, root / "out")
    assert capsys.readouterr().out.count("done before") == 2
    assert log(root, "one") == log(root, "three") == "new\n"
    assert markers(root) == {"one": True, "two": True, "three": True}


def test_a_failed_stage_lets_the_other_finish_and_goes_on_with_the_same_command(root):
    (root / "fail-one").write_text("1")
    later = stage("later")
    with pytest.raises(StageFailedError) as caught:
        run_stages([*two(), later], root, root / "out")
    message = str(caught.value)
    assert "the stage one ended with exit code 1" in message
    assert "the disk is on fire" in message
    assert str(root / "out" / "logs" / "one.log") in message
    assert "The same command goes on from here" in message
    assert "the stage two" not in message
    assert caught.value.code == 1
    assert markers(root) == {"one": False, "two": True}

    path = root / "out" / "stages" / "one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 1000.0}))
    (root / "fail-one").unlink()
    found = run_stages([*two(), later], root, root / "out")
    assert log(root, "one") == "new\nthe disk is on fire\nresumed\n"
    assert found["one"]["seconds"] > 1000
    assert "--resume" not in found["one"]["command"]


def test_the_log_of_a_failure_is_that_of_the_last_process_alone(root):
    for code, words in ((1, "the machine was switched off"), (3, "no room left")):
        (root / "tool.py").write_text(f"print({words!r}); raise SystemExit({code})")
        with pytest.raises(StageFailedError, match=f"exit code {code}") as caught:
            run_stages([stage("one")], root, root / "out")
    assert "no room left" in str(caught.value)
    assert "switched off" not in str(caught.value)
    assert "switched off" in log(root, "one")


def test_what_a_stage_refuses_would_be_refused_again_and_that_is_said(root):
    (root / "fail-one").write_text(str(EXIT_CODE))
    with pytest.raises(StageFailedError, match="mend that first") as caught:
        run_stages([stage("one")], root, root / "out")
    assert caught.value.code == EXIT_CODE
    assert "The same command goes on" not in str(caught.value)


def test_an_interrupt_ends_the_running_processes(root, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(stages.subprocess, "Popen", Recorded)
    monkeypatch.setattr(stages._Progress, "show", interrupt)
    (root / "tool.py").write_text("import time; time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        run_stages(two(), root, root / "out")
    assert [process.returncode for process in processes] == [-15, -15]
    assert markers(root) == {"one": False, "two": False}


def test_one_slot_runs_one_at_a_time_with_its_environment(root):
    (root / "tool.py").write_text(
        "import os, pathlib, time\n"
        "alone = pathlib.Path('alone'); alone.touch(exist_ok=False); time.sleep(0.2)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES']); alone.unlink()\n"
    )
    run_stages(two(), root, root / "out", [{"CUDA_VISIBLE_DEVICES": "7"}])
    assert log(root, "one") == log(root, "two") == "7\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["LR", "0.5"], "LR: not given before, now 0.5"),
        (["--flag", ""], "--flag: not given before, now ''"),
    ],
)
def test_another_option_than_that_of_a_stage_that_has_begun_is_named(root, change, told):
    run_stages([stage("one")], root, root / "out")
    with pytest.raises(InputError, match="one was made by another command") as caught:
        run_stages([stage("two"), stage("one", *change)], root, root / "out")
    assert f"  {told}\n" in str(caught.value)
    assert markers(root) == {"one": True}  # nothing was run


def test_the_config_key_and_the_file_that_have_changed_are_named(root):
    (root / "weights").write_bytes(b"1")
    run = stage("one", configs=("tiny.yaml",), files=("weights",))
    run_stages([run], root, root / "out")
    (root / "base.yaml").write_text("SOLVER: {STEPS: '(70, 95)'}\nVERSION: 2\n")
    (root / "weights").write_bytes(b"12")
    with pytest.raises(InputError) as caught:
        run_stages([run], root, root / "out")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "config file tiny.yaml: SOLVER.STEPS: (70, 90) before, now (70, 95)" in lines
    assert "config file tiny.yaml: VERSION: not given before, now 2" in lines
    assert "file weights: its content has changed" in lines
    assert not any("MAX_ITER" in line for line in lines)


def test_of_a_marker_of_an_older_version_the_command_and_the_suspects_are_named(root):
    run = stage("one", configs=("tiny.yaml",))
    run_stages([run], root, root / "out")
    path = root / "out" / "stages" / "one.json"
    marker = json.loads(path.read_text())
    del marker["made_of"]
    path.write_text(json.dumps(marker))
    run_stages([run], root, root / "out")
    with pytest.raises(InputError, match=r"LR: not given before, now 0\.5"):
        run_stages([stage("one", "LR", "0.5", configs=("tiny.yaml",))], root, root / "out")
    (root / "base.yaml").write_text("SOLVER: {STEPS: '(1,)'}\n")
    with pytest.raises(InputError, match=r"the content of one of tiny\.yaml"):
        run_stages([run], root, root / "out")


def test_a_stage_that_left_nothing_to_go_on_from_may_begin_with_another_command(root):
    (root / "fail-one").write_text("1")
    with pytest.raises(StageFailedError):
        run_stages([stage("one")], root, root / "out")
    (root / "fail-one").unlink()
    run_stages([stage("one", "LR", "0.5")], root, root / "out")
    assert log(root, "one") == "new\n"


def test_a_changed_stage_changes_those_that_need_it(root):
    def fingerprint(*words):
        return stage("two", needs=(stage("one", *words),)).fingerprint(root)

    assert fingerprint() == fingerprint() != fingerprint("LR", "1")


def test_a_second_run_of_all_stages_is_refused_and_starts_nothing(root):
    (root / "out").mkdir()
    first = RunLock(root / "out", pytest.fail, "--output")
    first.acquire()
    try:
        with pytest.raises(InputError, match=r"^--output \S+/out: another run is writing it"):
            run_stages(two(), root, root / "out")
        assert not (root / "out" / "logs").exists()
        run_stages(two()[:1], root, root / "out", alone=False)  # a task of a job array
    finally:
        first.release()
    run_stages(two(), root, root / "out")
    assert markers(root) == {"one": True, "two": True}


def test_a_stage_that_another_process_runs_is_not_run_a_second_time(root):
    (root / "out" / "stages").mkdir(parents=True)
    other = RunLock(root / "out", pytest.fail, "--output", "stages/one")
    other.acquire()
    try:
        with pytest.raises(
            StageFailedError, match="/out, one: another run is writing it"
        ) as caught:
            run_stages([stage("one")], root, root / "out")
        assert caught.value.code == EXIT_CODE
        assert not (root / "out" / "logs").exists()
    finally:
        other.release()


def test_a_stage_that_another_process_has_done_meanwhile_is_kept(root, monkeypatch, capsys):
    run_stages([stage("one")], root, root / "out")
    checked = stages.checked_marker
    answers = [{}]  # as it was before that
    monkeypatch.setattr(
        stages, "checked_marker", lambda *a: answers.pop() if answers else checked(*a)
    )
    found = run_stages([stage("one")], root, root / "out")
    assert "done by another process meanwhile: kept" in capsys.readouterr().out
    assert found["one"]["complete"]


def test_stages_that_were_taken_for_dead_end_and_end_their_processes(root, monkeypatch):
    monkeypatch.setattr(RunLock, "beat", 0.05)
    (root / "tool.py").write_text(
        "import os, time; from pathlib import Path; Path('other').write_text('another')\n"
        "os.replace('other', 'out/run.lock'); time.sleep(600)\n"
    )
    with pytest.raises(InputError, match=r"the lock run\.lock was (taken over|removed)"):
        run_stages([stage("one")], root, root / "out")
    assert markers(root) == {"one": False}


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1), (9, 2, 4)]
)
def test_processes_share_the_cores(tmp_path, monkeypatch, cores, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(stages, "cores", lambda: cores)
    assert stages.environment(tmp_path, processes)["OMP_NUM_THREADS"] == str(threads)


def test_threads_that_are_asked_for_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert stages.environment(tmp_path, 2)["OMP_NUM_THREADS"] == "7"


def test_stages_that_run_at_once_count_with_the_longest():
    seconds = {name: {"seconds": value} for name, value in zip(("zero", "one", "two"), (5, 40, 50))}
    assert elapsed([stage("zero"), *two()], seconds) == 5 + 50


def test_running_stages_share_a_line_of_their_last_words(monkeypatch, capsys):
    monkeypatch.setattr(stages, "_PERIOD", 0)
    progress = stages._Progress()
    training = "[11/21 05:50:53 d2.utils.events]:  eta: 0:01:40  iter: 99  total_loss: 3.14159"
    runs = [
        SimpleNamespace(stage=stage("one", label="one"), last_lines=lambda _: [training]),
        SimpleNamespace(stage=stage("two", label="two"), last_lines=lambda _: []),
    ]
    progress.show(runs, "0 of 2 done")
    progress.show([SimpleNamespace(stage=stage("three"), last_lines=lambda _: ["drawing"])], "")
    assert capsys.readouterr().out.splitlines() == [
        "  0:00 · 0 of 2 done · one: eta: 0:01:40  iter: 99  total_lo · two: running",
        "  0:00 · drawing",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3600, "1:00:00"), (3599.6, "1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
