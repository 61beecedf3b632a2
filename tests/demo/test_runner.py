"""Stages as processes: done once, continued, and failing loudly."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.demo.main import run_demo
from virtex_d2.studies.demo.plan import make_budget, make_plan
from virtex_d2.studies.pipeline import process, runner
from virtex_d2.studies.pipeline.progress import Progress
from virtex_d2.studies.pipeline.runner import StageFailedError
from virtex_d2.studies.reporting import plots

TOOL = Path(__file__).resolve().parents[2] / "tools" / "demo.py"


def logs(output: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (output / "logs").iterdir()}


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch):
    """Nothing here looks at them."""
    monkeypatch.setattr(plots, "DPI", 30)
    monkeypatch.setattr(plots, "PHOTO_DPI", 30)


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished demo in a project of its own, to be changed."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "demo"


def test_complete_stages_are_kept_and_the_report_is_made_anew(finished_copy, capsys):
    before = logs(finished_copy)
    for path in finished_copy.glob("*.png"):
        path.unlink()
    run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=2)
    assert logs(finished_copy) == before
    assert capsys.readouterr().out.count("done before") == 9
    assert len(list(finished_copy.glob("*.png"))) == 5


def test_more_seeds_run_the_new_ones_only(finished_copy, capsys):
    before = logs(finished_copy)
    run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=3)
    after = logs(finished_copy)
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {"seed3-pretrain", "seed3-random", "seed3-pretrained"}


def test_a_failed_stage_ends_the_demo_with_its_log_and_without_a_report(finished_copy):
    # Seed 3 is new, and its tool finds something that makes it fail.
    trap = finished_copy / "runs" / "seed3" / "pretrain" / "fail"
    trap.parent.mkdir(parents=True)
    trap.touch()
    with pytest.raises(StageFailedError) as caught:
        run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=3)
    message = str(caught.value)
    assert "seed3-pretrain ended with exit code 1" in message
    assert "the disk is on fire" in message
    assert str(finished_copy / "logs" / "seed3-pretrain.log") in message
    assert not (finished_copy / "report.html").exists()
    assert "seed3-random" not in logs(finished_copy)

    trap.unlink()
    run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=3)
    log = logs(finished_copy)["seed3-pretrain"]
    assert log.startswith("new\nthe disk is on fire\nresumed\n")
    assert (finished_copy / "report.html").exists()


def test_the_time_of_a_stage_includes_its_stopped_runs(project, monkeypatch):
    output = project / "demo"
    trap = output / "runs" / "seed1" / "pretrain" / "fail"
    run_demo_until_failure(project, output, trap)
    marker = output / "stages" / "seed1-pretrain.json"
    content = json.loads(marker.read_text())
    assert not content["complete"]
    marker.write_text(json.dumps({**content, "seconds": 1000.0}))
    trap.unlink()
    run_demo(project, output, scale=0.05)
    assert json.loads(marker.read_text())["seconds"] > 1000


def run_demo_until_failure(project: Path, output: Path, trap: Path) -> None:
    # The trap lies in a folder that the demo must find empty, so it is set when the demo has begun.
    script = project / "tools" / "make_shapes.py"
    lines = f"\nfrom pathlib import Path as P\nt = P({str(trap)!r})\n"
    lines += "t.parent.mkdir(parents=True, exist_ok=True)\nt.touch()\n"
    script.write_text(script.read_text() + lines)
    with pytest.raises(StageFailedError):
        run_demo(project, output, scale=0.05)


def test_an_output_folder_of_another_scale_is_refused(finished):
    before = sorted(finished.rglob("*"))
    with pytest.raises(InputError, match=r"scale 0\.1; now scale 1"):
        run_demo(finished.parent, finished, scale=1)
    assert sorted(finished.rglob("*")) == before


def test_an_output_folder_with_something_else_in_it_is_refused(project):
    (project / "demo").mkdir()
    (project / "demo" / "thesis.tex").touch()
    with pytest.raises(InputError, match="no demo has left there"):
        run_demo(project, project / "demo")
    assert [path.name for path in (project / "demo").iterdir()] == ["thesis.tex"]


def test_a_stage_of_another_config_is_refused_before_anything_runs(finished_copy):
    with open(finished_copy.parent / "configs/shapes/Base.yaml", "a") as file:
        file.write("SEED: 7\n")
    before = logs(finished_copy)
    with pytest.raises(InputError, match="seed1-random was made by another command, config"):
        run_demo(finished_copy.parent, finished_copy, scale=0.1, num_seeds=3)
    assert logs(finished_copy) == before


def test_an_interrupt_ends_the_running_processes(project, monkeypatch):
    def interrupt(self, line, label):
        if label:  # a detector's first line
            raise KeyboardInterrupt

    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(process.subprocess, "Popen", Recorded)
    monkeypatch.setattr(Progress, "update", interrupt)
    script = project / "tools" / "train_net.py"
    script.write_text("import time; print('on', flush=True); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        run_demo(project, project / "demo", scale=0.1)
    assert len(processes) == 6  # three splits, the pretraining and both detectors
    assert all(process.returncode is not None for process in processes)
    marker = json.loads((project / "demo" / "stages" / "seed1-random.json").read_text())
    assert not marker["complete"]


def test_a_detector_that_fails_lets_the_other_finish(project):
    script = project / "tools" / "train_net.py"
    content = script.read_text()
    trap = "import sys\nif 'backbone' in str(sys.argv): sys.exit('no room left')\n"
    script.write_text(
        trap + content.replace('"""Stands', '"Stands', 1).replace('draw."""', 'draw."')
    )
    with pytest.raises(StageFailedError) as caught:
        run_demo(project, project / "demo", scale=0.1)
    message = str(caught.value)
    assert "seed1-pretrained ended with exit code 1" in message
    assert "no room left" in message
    assert "seed1-random" not in message
    markers = {p.stem: json.loads(p.read_text()) for p in (project / "demo/stages").iterdir()}
    assert markers["seed1-random"]["complete"]
    assert not markers["seed1-pretrained"]["complete"]

    script.write_text(content)
    run_demo(project, project / "demo", scale=0.1)
    assert (project / "demo" / "report.html").exists()


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1), (9, 2, 4)]
)
def test_processes_share_the_cores(tmp_path, monkeypatch, cores, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(process, "cores", lambda: cores)
    assert process.environment(tmp_path, processes)["OMP_NUM_THREADS"] == str(threads)


def test_threads_that_are_asked_for_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process.environment(tmp_path, 2)["OMP_NUM_THREADS"] == "7"


def test_stages_that_run_at_once_count_with_the_longest(finished_copy):
    plan = make_plan(
        finished_copy.parent, finished_copy, make_budget(finished_copy.parent, 0.1), num_seeds=1
    )
    seconds = dict(zip([stage.name for stage in plan.stages], (1, 2, 3, 10, 40, 50)))
    markers = {name: {"seconds": value} for name, value in seconds.items()}
    assert runner.elapsed(plan.stages, markers) == 1 + 2 + 3 + 10 + 50


def test_the_tool_reports_a_failed_stage_and_exits_with_1(project, run_python):
    shutil.copy(TOOL, project / "tools")
    (project / "tools" / "make_shapes.py").write_text("raise SystemExit('no shapes today')")
    result = run_python(project / "tools" / "demo.py", "--scale", 0.1, cwd=project)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the stage world-captions ended with exit code 1")
    assert "no shapes today" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_tool_reports_bad_input_and_exits_with_2(project, run_python):
    shutil.copy(TOOL, project / "tools")
    result = run_python(project / "tools" / "demo.py", "--scale", -1, cwd=project)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --scale -1.0")
    assert not (project / "demo").exists()


def test_the_tool_takes_its_scale_from_the_environment(project, run_python):
    shutil.copy(TOOL, project / "tools")
    result = run_python(project / "tools" / "demo.py", cwd=project, env={"DEMO_SCALE": "0.05"})
    assert result.returncode == 0, result.stderr
    assert json.loads((project / "demo" / "demo.json").read_text()) == {"scale": 0.05}
    assert "caption-pretrained" in result.stdout
    assert str(project / "demo" / "report.html") in result.stdout
