"""tools/check_gpu.py: plan, runner and report in here; all steps once, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import plan, report, runner
from benchmarks.gpu.plan import FLOOR, STEPS, limit
from tests.conftest import ROOT

TOOL = ROOT / "tools" / "check_gpu.py"
NAMES = [name for name in STEPS if name != plan.LAST]


def limits(seconds, used=lambda allowed: allowed):
    """By name, the limits of all steps, of which each takes what `used` says."""
    found = {}
    for place, name in enumerate(NAMES):
        found[name] = limit(name, NAMES[place + 1 :], seconds)
        seconds -= used(found[name] or 0)
    return found


def test_steps_that_took_too_long_before_have_the_largest_limits():
    found = limits(1800)
    largest = sorted(found, key=found.get)[-3:]
    assert set(largest) == {"checkpoints", "pretraining", "variants"}
    assert sum(found.values()) == pytest.approx(1800)


@pytest.mark.parametrize("minutes", [1, 4, 8, 30])
def test_no_step_has_less_than_the_floor_and_all_together_no_more_than_there_is(minutes):
    given = [found for found in limits(60 * minutes).values() if found is not None]
    assert all(found >= FLOOR for found in given)
    assert sum(given) <= 60 * minutes + 1e-6


def test_what_a_step_leaves_goes_to_the_later_ones():
    assert limits(480, used=lambda _: 20)["ceilings"] == pytest.approx(480 - 9 * 20)
    assert limits(480)["ceilings"] is None


def test_data_gets_what_is_left_and_keeps_nothing_from_the_others():
    assert limit("environment", [*NAMES[1:], plan.LAST], 1800) == limits(1800)["environment"]
    assert limit(plan.LAST, [], 1000) == 1000


# Runs a made-up step in the place of benchmarks.gpu.step: `python step.py NAME --folder F ...`
FAKE = """\
import json, os, pathlib, subprocess, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[3])
(folder / "seen.json").write_text(json.dumps({"environment": dict(os.environ), "words": sys.argv}))
record = {"checks": [{"name": "a", "passed": True, "told": "1"}], "figures": {}, "notes": []}
record |= {"headline": "fast", "ended": True}
if name == "numbers":
    record["checks"] += [{"name": "b", "passed": False, "told": "0.2 apart"}]
if name == "timing":
    record["checks"] = []
if name == "variants":
    del record["ended"]
(folder / f"{name}.json").write_text(json.dumps(record))
if name == "detection":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    (folder / "child").write_text(str(child.pid))
    time.sleep(1000)
"""


@pytest.fixture
def fake_steps(tmp_path, monkeypatch):
    """The runner starts FAKE; `fake_steps(names, seconds)` -> what it found, in tmp_path/out."""
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    for folder in (tmp_path / "benchmarks", tmp_path / "benchmarks" / "gpu"):
        (folder / "__init__.py").touch()
    (tmp_path / "benchmarks" / "gpu" / "step.py").write_text(FAKE)
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def run(names, seconds=600.0, **options):
        said = []
        found = runner.run_steps(names, seconds, tmp_path / "out", options, say=said.append)
        return found, said

    return run


def ended(pid):
    """Whether a process is gone, or waits for nothing but to be counted as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_step_passes_with_checks_that_all_pass_and_an_end(fake_steps, tmp_path):
    names = ["environment", "numbers", "timing", "variants"]
    found, said = fake_steps(names)
    states = {name: result["state"] for name, result in found["steps"].items()}
    assert states == {name: "PASS" if name == "environment" else "FAIL" for name in names}
    assert not found["passed"]
    assert found == json.loads((tmp_path / "out" / "check_gpu.json").read_text())
    assert "fast" in said[0]
    assert "b: 0.2 apart" in said[1]  # what failed, not what the step is proud of
    assert "a crash, exit code 0" in said[3]
    page = (tmp_path / "out" / "summary.md").read_text()
    assert page.startswith("# GPU check: NOT passed")
    assert "1 of 4 steps passed" in page


def test_a_step_that_takes_too_long_is_ended_with_all_it_has_started(
    fake_steps, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "limit", lambda *_: 5.0)
    found, _ = fake_steps(["detection"])
    assert found["steps"]["detection"]["state"] == "FAIL"
    assert found["steps"]["detection"]["checks"][-1]["told"] == "its time limit"
    assert found["steps"]["detection"]["checks"][0]["passed"]  # what it had found before
    assert ended((tmp_path / "out" / "work" / "child").read_text())


def test_a_step_without_time_is_no_pass_and_is_named(fake_steps):
    found, said = fake_steps(["environment"], seconds=FLOOR - 1)
    assert found["steps"]["environment"]["state"] == "NOT RUN"
    assert not found["passed"]
    assert "no time left: raise --minutes" in said[0]


def test_a_step_is_one_process_whatever_has_started_the_check(fake_steps, tmp_path, monkeypatch):
    for key in ("SLURM_PROCID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "VIRTEX_REQUEUE_MARKER"):
        monkeypatch.setenv(key, "1")
    fake_steps(["environment"], device="cpu", captions="")
    seen = json.loads((tmp_path / "out" / "work" / "seen.json").read_text())
    assert not {"SLURM_PROCID", "RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(seen["environment"])
    assert "VIRTEX_REQUEUE_MARKER" not in seen["environment"]
    assert seen["words"][seen["words"].index("--device") + 1] == "cpu"
    assert "--captions" not in seen["words"]


def test_term_ends_the_running_steps_processes(fake_steps, tmp_path):
    """As a scheduler does it: the check's own process alone gets the signal."""
    program = (
        "import pathlib, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu import runner\n"
        "runner.ROOT = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "runner.run_steps(['detection'], 600, runner.ROOT / 'out', {})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    child = tmp_path / "out" / "work" / "child"
    while not (child.is_file() and child.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert ended(child.read_text())


def test_a_line_says_what_failed_in_one_line():
    checks = [{"name": "x", "passed": False, "told": "a\nb | c"}]
    told = report.line("timing", {"state": "FAIL", "seconds": 3.0, "checks": checks})
    assert told.startswith("FAIL     timing")
    assert told.endswith("x: a b / c")


@pytest.fixture
def step(tmp_path):
    """`step(device)` -> a `Step`, as of that device; a CPU is what computes."""
    from benchmarks.gpu.step import Step

    return lambda device="cpu", seconds=100: Step("numbers", tmp_path, device, seconds)


def failed(step):
    """Names of the checks on disk that have failed."""
    found = json.loads((step.folder / f"{step.name}.json").read_text())
    return [check["name"] for check in found["checks"] if not check["passed"]]


def test_a_limit_of_seconds_is_a_check_on_a_gpu_and_a_note_on_a_cpu(step):
    gpu, cpu = step("cuda"), step()
    for value in (0.5, 1.0, 2.1, float("nan")):
        gpu.limit(f"ratio {value}", value, "times", least=0.9, most=2)
    assert failed(gpu) == ["ratio 0.5", "ratio 2.1", "ratio nan"]
    cpu.limit("ratio", 0.5, "times", least=0.9)
    assert not cpu.found["checks"]
    assert (
        "ratio: 0.5 times; its limit (at least 0.9) is for GPUs, not on a CPU"
        in (cpu.found["notes"])
    )


@pytest.mark.parametrize("losses", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_losses_that_are_missing_or_not_finite_fail(step, losses):
    found = step()
    found.finite("training", losses)
    assert failed(found) == ["training: finite"]


def test_a_part_without_time_fails_on_a_gpu(step):
    short = step("cuda", seconds=10)
    assert short.late("COMPILE", 60)
    assert failed(short) == ["COMPILE"]
    assert not step("cuda").late("COMPILE", 60)
    assert not step(seconds=10).late("COMPILE", 60)


def test_wrong_numbers_fail(step, monkeypatch):
    """Products, colours and pooled features that are a little off, as of a broken kernel."""
    import torch

    from benchmarks.gpu import ceilings, numbers

    found = step()
    product, pooled = torch.Tensor.__matmul__, numbers.ROIPooler.forward

    def off(a, b):
        return product(a, b) * (1 if a.dtype == torch.float64 else 1.02)

    monkeypatch.setattr(torch.Tensor, "__matmul__", off)
    ceilings._right(found)
    assert failed(found) == ["a product in float32", "a product in bfloat16"]

    def off_under_autocast(pooler, maps, boxes):
        return pooled(pooler, maps, boxes) * (1.01 if torch.is_autocast_enabled("cpu") else 1)

    monkeypatch.setattr(numbers.ROIPooler, "forward", off_under_autocast)
    numbers._roi_features(found)
    assert failed(found)[2:] == ["RoI features in bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--minutes 0", "--minutes 0.0: expected a number above 0"),
        ("--captions .", "photographs: expected both --captions and --voc"),
        ("--only photographs", "photographs: expected both --captions and --voc"),
        ("--captions . --voc .", "--captions .: expected captions_train.json in it, found none"),
    ],
)
def test_mistakes_are_told_in_a_line(run_tool, arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_tool(TOOL, *arguments.split()) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_all_steps_run_on_a_cpu_after_two_processes_have_met(run_python, tmp_path):
    """Each says what it has done in the place of what only a GPU can do, and passes by checks."""
    words = ("--device", "cpu", "--output", tmp_path / "out", "--minutes", 120)
    done = run_python(TOOL, *words, "--num-processes", 2, timeout=1800)
    found = json.loads((tmp_path / "out" / "check_gpu.json").read_text())
    assert list(found["steps"]) == ["nodes", *NAMES]
    failed = {
        name: [check for check in result["checks"] if not check["passed"]]
        for name, result in found["steps"].items()
        if result["state"] != "PASS"
    }
    assert not failed, done.stdout
    assert done.returncode == 0
    notes = " ".join(note for result in found["steps"].values() for note in result["notes"])
    for what in ("float16", "NCCL", "COMPILE, which takes minutes", "waits by sync_debug_mode"):
        assert f"{what}: not on a CPU" in notes
    assert found["steps"]["nodes"]["headline"].startswith("2 ranks")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("check_gpu.json", "log.txt", "nodes.json", "summary.md")
    ]


def test_a_job_asks_once_to_be_requeued(tmp_path, monkeypatch):
    from benchmarks.gpu import nodes

    marker = tmp_path / "unfinished.json"
    without, first, second = ({"checks": [], "notes": []} for _ in range(3))
    monkeypatch.delenv("VIRTEX_REQUEUE_MARKER", raising=False)
    assert nodes._requeue(without, tmp_path) is None
    assert "not without a job" in without["notes"][0]
    monkeypatch.setenv("VIRTEX_REQUEUE_MARKER", str(marker))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert nodes._requeue(first, tmp_path) == 0
    assert not first["checks"][0]["passed"]
    assert json.loads(marker.read_text())["requeue"] is True
    marker.unlink()
    (tmp_path / nodes.FILE).write_text(json.dumps(first))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert nodes._requeue(second, tmp_path) == 1
    assert second["checks"][0]["passed"]
    assert not marker.exists()
