"""A comparison as a whole: what is done stays done, and the report says what was measured."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.compare.conftest import COMMAND, ROOT, comparison
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare import comparison as comparing
from virtex_d2.studies.compare import main
from virtex_d2.studies.compare.comparison import report_collected
from virtex_d2.studies.compare.report import write_report
from virtex_d2.studies.compare.runs import Metric, collect
from virtex_d2.studies.stages import StageFailedError

PLACE = "out/runs/tiny/100pct"  # of runs of the whole training set
BOTH = [f"{name}={PLACE}/{name}/seed1" for name in ("random", "virtex")]


def logs(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "logs").iterdir()}


def texts(folder: Path) -> list[str]:
    names = ("report.html", "results.csv", "summary.csv")
    return [(folder / "out" / name).read_text(encoding="utf-8") for name in names]


def trapezoids(folder: Path, key: str) -> float:
    """The area under a result's curve from zero, over the run's length."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    points = [(0, 0.0), *((line["iteration"] + 1, line[key]) for line in lines if key in line)]
    steps = itertools.pairwise(points)
    return sum((j - i) * (a + b) / 2 for (i, a), (j, b) in steps) / points[-1][0]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_tool(monkeypatch, *arguments):
    """The tool in this process, in the current folder."""
    words = ["compare_inits.py", "--output", "out", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    main.main(Path.cwd())


def test_stopped_at_two_places_nothing_is_done_twice_and_the_report_is_the_same(project, finished):
    comparison(finished).report()
    done: dict[str, int] = {}
    for allowed in (2, 3):
        (project / "stop_after").write_text(str(allowed))
        with pytest.raises(StageFailedError, match="the machine was switched off"):
            comparison(project).run()
        complete = {
            f"{path.stem}.log"
            for path in (project / "out" / "stages").iterdir()
            if json.loads(path.read_text())["complete"]
        }
        assert len(complete) == len(done) + allowed
        now = logs(project)
        assert {name: now[name] for name in done} == done
        done = {name: now[name] for name in complete}
    comparison(project).report()
    assert "7 runs are not finished" in texts(project)[0]
    (project / "stop_after").unlink()
    comparison(project).run()
    comparison(project).report()
    now = logs(project)
    assert {name: now[name] for name in done} == done
    assert texts(project) == texts(finished)


def test_an_interrupt_from_the_terminal_ends_the_tool_and_its_runs(project):
    script = project / "tools" / "train_net.py"
    slow = "import time; print('on', flush=True); time.sleep(60)\n"
    content = script.read_text()
    script.write_text(slow)
    command = [sys.executable, "tools/compare_inits.py", "--output", "out", *COMMAND]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a test run in the background ignores the signal, and what it starts would, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = project / "out" / "logs" / "tiny-100pct-random-seed1.log"
    deadline = time.monotonic() + 300
    while not (log.exists() and "on" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().endswith("The same command goes on from here.")
    assert "Traceback" not in errors
    script.write_text(content)
    comparison(project).run()
    assert comparison(project).finished()[1] == []


def test_the_csv_files_hold_what_the_runs_recorded(finished):
    comparison(finished).report()
    rows = table(finished / "out" / "results.csv")
    assert len(rows) == 12 * 20
    one = next(
        row
        for row in rows
        if (row["init"], row["fraction"], row["seed"]) == ("virtex", "0.1", "2")
        and row["metric"] == "segm/AP50"
    )
    folder = finished / "out" / "runs" / "tiny" / "10pct" / "virtex" / "seed2"
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    assert float(one["value"]) == pytest.approx(last["segm/AP50"], abs=1e-4)
    absent = [row for row in rows if row["metric"] in ("bbox/AP-unicorn", "bbox/APl")]
    assert absent
    assert {row["value"] for row in absent} == {""}

    summary = table(finished / "out" / "summary.csv")
    row = next(
        row
        for row in summary
        if (row["init"], row["fraction"], row["metric"]) == ("virtex", "1.0", "bbox/AP")
    )
    values = {
        init: [
            float(r["value"])
            for r in rows
            if (r["init"], r["fraction"], r["metric"]) == (init, "1.0", "bbox/AP")
        ]
        for init in ("random", "virtex")
    }
    differences = [v - r for v, r in zip(values["virtex"], values["random"])]
    assert float(row["difference"]) == pytest.approx(sum(differences) / 3, abs=1e-3)
    assert float(row["ci95_low"]) < float(row["difference"]) < float(row["ci95_high"])
    assert row["paired_seeds"] == "3"
    area = next(
        row
        for row in rows
        if (row["init"], row["fraction"], row["seed"]) == ("virtex", "0.1", "2")
        and row["metric"] == "segm/area"
    )
    assert float(area["value"]) == pytest.approx(trapezoids(folder, "segm/AP"), abs=1e-4)


def test_runs_that_are_missing_in_a_report_are_named_on_the_terminal(project, capsys):
    run = comparison(project, seeds=(1,), fractions=(1.0,))
    run.run(only=0)
    assert list(logs(project)) == ["tiny-100pct-random-seed1.log"]
    with pytest.raises(InputError, match="0 to 1"):
        run.run(only=2)
    capsys.readouterr()
    run.report()
    told = "Not finished: 1 of 2 runs:\n  tiny-100pct-virtex-seed1\n"
    assert capsys.readouterr().out == told
    assert "1 run is not finished" in re.sub(r"\s+", " ", texts(project)[0])
    with pytest.raises(InputError, match="baseline random; now baseline virtex"):
        comparison(project, baseline="virtex").run(only=0)


def test_without_a_finished_run_there_is_no_report(project):
    with pytest.raises(InputError, match="no run is finished yet"):
        comparison(project).report()


def test_starts_that_differ_in_more_than_their_weights_are_shown(project):
    opts = [["virtex", "MODEL.RESNETS.NORM", "FrozenBN"]]
    run = comparison(project, seeds=(1,), fractions=(1.0,), init_opts=opts)
    run.run()
    run.report()
    html = texts(project)[0]
    assert "the starts differ in more than their weights" in html
    assert "<td>MODEL.RESNETS.NORM</td>" in html
    assert "<td>SEED</td>" not in html


def test_equal_configs_are_said_to_be_equal(finished):
    comparison(finished).report()
    assert "differ in nothing but start, seed and folder" in texts(finished)[0]


def test_a_run_of_another_seed_in_a_folder_is_found(finished):
    path = finished / PLACE / "random" / "seed2" / "config.yaml"
    path.write_text(path.read_text().replace('"SEED": 2', '"SEED": 7'))
    with pytest.raises(InputError, match="expected SEED 2, found 7: another run is in this folder"):
        comparison(finished).report()


def test_another_config_than_that_of_finished_runs_is_refused(finished):
    before = logs(finished)
    (finished / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 200}\n")
    with pytest.raises(InputError, match=r"MAX_ITER: 100 before, now 200"):
        comparison(finished).run()
    assert logs(finished) == before


def test_a_run_ends_with_the_comparison_that_is_killed(project):
    script = project / "tools" / "train_net.py"
    script.write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)\n")
    command = [sys.executable, "tools/compare_inits.py", "--output", "out", *COMMAND]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not ((project / "pid").exists() and (project / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    run = Path("/proc", (project / "pid").read_text())
    while run.exists() and "zombie" not in (run / "status").read_text():
        assert time.monotonic() < deadline, "the run goes on"
        time.sleep(0.05)


def test_runs_that_were_trained_elsewhere_give_the_same_numbers(finished):
    comparison(finished).report()
    here = table(finished / "out" / "results.csv")
    inits, runs = collect([f"{name}=out/runs/tiny/*/{name}/seed*" for name in ("random", "virtex")])
    (finished / "elsewhere").mkdir()
    write_report(finished / "elsewhere", inits, runs)
    there = table(finished / "elsewhere" / "results.csv")

    def numbers(rows):
        keys = ("fraction", "init", "seed", "metric", "value")
        return sorted(tuple(row[key] for key in keys) for row in rows)

    assert numbers(there) == numbers(here)
    assert {row["config"] for row in there} == {"tiny_val, R50, FPN, masks, 100 iterations"}


def test_the_baseline_of_collected_runs_is_chosen_and_their_folder_is_their_own(finished):
    _, blocks = report_collected(finished / "report", BOTH[::-1])
    assert blocks[0].baseline == "random"
    _, blocks = report_collected(finished / "report", BOTH, "virtex")
    assert blocks[0].baseline == "virtex"
    with pytest.raises(InputError, match="Did you mean 'virtex'"):
        report_collected(finished / "report", BOTH, "virtx")
    before = sorted((finished / PLACE).rglob("*"))
    for other in (finished / PLACE / "virtex" / "seed1", finished / "out"):
        with pytest.raises(InputError, match="holds"):
            report_collected(other, BOTH)
    assert sorted((finished / PLACE).rglob("*")) == before


def test_runs_on_other_files_of_the_same_name_are_not_compared(finished):
    for name in ("random", "virtex"):
        path = finished / PLACE / name / "seed1" / "config.yaml"
        config = json.loads(path.read_text())
        config["VIRTEX"]["DATASETS"] = [["tiny_val", "coco", f"/data/{name}.json", "/images"]]
        path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"evaluated on virtex.json, and .* on random.json"):
        collect(BOTH)


def test_equal_results_are_said_to_be_equal(finished):
    folder = f"{PLACE}/random/seed1"
    report_collected(finished / "report", [f"a={folder}", f"b={folder}"])
    html = (finished / "report" / "report.html").read_text()
    assert "Box AP: no difference of a tenth of a point between b and a." in html
    assert "-0.0" not in html
    assert "more than noise" not in html.split("<h2>")[0]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["random"], "expected NAME=FOLDERS"),
        (["random=nowhere/*"], "no folder has such a name"),
        ([f"random={PLACE}/*/seed1"], "has the same start, config, fraction and seed"),
        (["random=configs"], "config.yaml: cannot read"),
    ],
)
def test_folders_that_cannot_be_collected_are_refused(finished, patterns, message):
    with pytest.raises(InputError, match=message):
        collect(patterns)


def test_collected_runs_of_one_start_are_no_comparison(finished):
    with pytest.raises(InputError, match="expected 2 to 8 initialisations to compare, found 1: a"):
        report_collected(finished / "report", [f"a={PLACE}/random/seed1"])
    assert not (finished / "report").exists()


def test_a_run_that_has_not_come_to_its_end_is_refused(finished):
    path = finished / PLACE / "random" / "seed1" / "metrics.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(
        InputError, match=r"expected an evaluation after the last iteration \(100\)"
    ):
        collect(BOTH)


def test_nothing_detected_is_ap_0_and_an_absent_class_is_left_out(finished):
    path = finished / PLACE / "random" / "seed1" / "metrics.json"
    *lines, last = path.read_text().splitlines()
    last = {key: float("nan") if "/" in key else v for key, v in json.loads(last).items()}
    path.write_text("\n".join([*lines, json.dumps(last)]) + "\n")
    (run,) = collect(BOTH[:1])[1]
    assert run.results[Metric("", "bbox", "", "AP")] == 0
    cat = run.results[Metric("", "bbox", "", "AP-cat")]
    assert cat != cat


def test_costs_count_every_process(finished):
    (run,) = collect(BOTH[:1])[1]
    assert run.processes == 2
    assert run.cost == pytest.approx(2 * 100 * 0.5 / 3600)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("bbox/AP", ("", "bbox", "", "AP")),
        ("coco_2017_val/segm/AP-traffic light", ("coco_2017_val", "segm", "", "AP-traffic light")),
        ("bbox_TTA/AP50", ("", "bbox", "_TTA", "AP50")),
        ("bbox/AP-a/b", ("", "bbox", "", "AP-a/b")),
        ("total_loss", None),
    ],
)
def test_names_of_results_are_taken_apart_and_put_together(key, parts):
    metric = Metric.parse(key)
    assert metric == (parts and Metric(*parts))
    assert metric is None or metric.key == key


@pytest.mark.parametrize(
    ("devices", "jobs", "num_gpus", "slots"),
    [
        ([], 0, 1, [{}]),
        ([], 3, 1, [{}] * 3),
        (["0", "1", "2", "3"], 0, 2, [{"CUDA_VISIBLE_DEVICES": d} for d in ("0,1", "2,3")]),
        (["5", "7"], 1, 1, [{"CUDA_VISIBLE_DEVICES": "5"}]),
    ],
)
def test_runs_share_the_gpus_without_overlap(monkeypatch, devices, jobs, num_gpus, slots):
    monkeypatch.setattr(comparing, "_visible_devices", lambda: devices)
    assert comparing.gpu_slots(jobs, num_gpus) == slots


def test_more_runs_at_a_time_than_gpus_have_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(comparing, "_visible_devices", lambda: ["0", "1", "2"])
    with pytest.raises(InputError, match="1 runs of 2 share"):
        comparing.gpu_slots(2, 2)
    with pytest.raises(InputError, match="only 3 GPUs"):
        comparing.gpu_slots(0, 4)


def test_the_tool_lists_runs_and_reports(project, monkeypatch, capsys):
    run_tool(monkeypatch, *COMMAND, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(n) for n in range(4)]
    more = ("--seeds", 7, "--fractions", 0.25)  # flags that are given twice add up
    run_tool(monkeypatch, *more, *COMMAND, "--list")
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) > len(lines)
    assert {"7", "0.25"} <= set(re.findall(r"[\w.]+", listed))
    assert not (project / "out").exists()
    run_tool(monkeypatch, *COMMAND, "--jobs", 2)
    told = capsys.readouterr().out
    assert re.search(r"^virtex +\d+\.\d", told, re.MULTILINE)
    assert f"Report: {project / 'out' / 'report.html'}" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--init", "random"), "error: --config-file"),
        (("--collect", "a=b", "--seeds", 1, "--only", 0), "leave --seeds, --only out"),
        ((*COMMAND, "--list", "--opts", "SOLVER.MAX_ITR", 3), "--opts: unknown key"),
    ],
)
def test_the_tool_refuses_what_it_cannot_do(project, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run_tool(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (project / "out").exists()


def test_the_stand_in_writes_what_the_real_trainer_writes(finished):
    """Its config.yaml has the keys that are read, as detectron2 names them."""
    from virtex_d2.detection.config import get_virtex_cfg

    path = finished / PLACE / "virtex" / "seed1" / "config.yaml"
    real = get_virtex_cfg()

    def check(node, found):
        for key, value in found.items():
            if isinstance(value, dict):
                check(node[key], value)
            elif key != "FRACTION":
                assert key in node

    check(real, yaml.safe_load(path.read_text()))
