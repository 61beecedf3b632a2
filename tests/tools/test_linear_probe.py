"""tools/linear_probe.py as a program: on a small set, and on the real subset of VOC2007."""

import csv
import json
from pathlib import Path

import pytest

from tests.probes.small_sets import COLOURS, write_voc

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "linear_probe.py"
CONFIGS = ROOT / "configs" / "probes"
# A ResNet-18 of random weights on small pixels.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "random", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "DATA.NUM_WORKERS", "0"),
]


@pytest.fixture
def run_tool(run_python, tmp_path):
    """`run_tool(*arguments)` -> the finished process; OUTPUT_DIR is tmp_path/run."""
    own = ["OUTPUT_DIR", tmp_path / "run", "DATA.CACHE_DIR", tmp_path / "cache", *SMALL]

    def run(*arguments):
        return run_python(TOOL, "--config-file", CONFIGS / "voc07_svm.yaml", *own, *arguments)

    return run


@pytest.mark.slow
def test_the_program_writes_its_results_or_one_line_of_error(run_tool, tmp_path):
    images = {f"{n:02}": [(name, False)] for n, name in zip(range(24), [*COLOURS] * 8)}
    names = list(images)
    write_voc(tmp_path / "VOC", images, {"trainval": names[:15], "test": names[15:]})
    data = ["DATA.ROOT", tmp_path / "VOC", "INPUT.RESIZE", "36", "INPUT.CROP", "32"]
    failed = run_tool(*data)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "error: " in failed.stderr
    assert "is none of VOC's twenty classes" in failed.stderr

    process = run_tool(*data, "DATA.CLASSES", str([*COLOURS]))
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["metrics"]["mAP11"] > 90
    assert "mAP11" in process.stdout


@pytest.mark.slow
def test_the_real_subset_is_probed_class_by_class(run_tool, real_data, tmp_path):
    classes = ["bus", "car", "cat", "person", "train"]
    process = run_tool(
        *("DATA.ROOT", real_data / "VOC2007", "DATA.CLASSES", str(classes)),
        *("INPUT.RESIZE", "64", "INPUT.CROP", "64"),
    )
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "run" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == classes
    for row in rows:
        # the share of positives is what a ranking by chance has
        chance = 100 * int(row["test_positives"]) / (400 - int(row["test_ignored"]))
        assert chance < float(row["AP"]) < 100
