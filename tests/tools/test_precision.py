"""benchmarks/precision.py: two precisions side by side, continued, and refused where it cannot."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = (
    *("MODEL.VISUAL.NAME", "resnet18", "MODEL.TEXTUAL.HIDDEN_SIZE", 64, "DATA.IMAGE_SIZE", 32),
    *("SOLVER.IMS_PER_BATCH", 4, "TEST.IMS_PER_BATCH", 8),
)


@pytest.fixture
def precision(shapes_world, run_python, tmp_path):
    def run(*flags, validated=True):
        options = [
            "--output",
            tmp_path / "out",
            "--config-file",
            "configs/pretrain/shapes_R_50.yaml",
        ]
        options += ["--iterations", 4, "--points", 2, *flags, "--opts", *SMALL]
        for key, split in (("TRAIN", "train"), ("VAL", "test"))[: 1 + validated]:
            captions = shapes_world / "annotations" / f"captions_{split}.json"
            options += [f"DATA.{key}_CAPTIONS", captions]
            options += [f"DATA.{key}_IMAGES", shapes_world / "images" / split]
        return run_python("benchmarks/precision.py", *options)

    return run


def rows(output: str) -> dict[str, list[float]]:
    found = re.findall(r"^\| (\S.*?) \| (.*) \|$", output, re.MULTILINE)[1:]
    return {name: [float(value) for value in values.split(" | ")] for name, values in found}


def recorded(folder: Path, precision: str) -> list[float]:
    """The losses of a run with seed 1."""
    lines = (folder / "out" / f"{precision}-seed1" / "metrics.json").read_text().splitlines()
    return [json.loads(line)["total_loss"] for line in lines]


def test_losses_of_both_precisions_and_their_differences(precision, tmp_path):
    first = precision("--seeds", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    alone = rows(first.stdout)
    assert list(alone) == [
        "float32, seed 1",
        "bfloat16, seed 1",
        "bfloat16 from float32, the same seed",
    ]
    assert all(len(values) == 3 for values in alone.values())  # two points and a validation
    # unrounded: in three digits, few iterations may be alike
    assert recorded(tmp_path, "float32") != recorded(tmp_path, "bfloat16")

    both = precision("--seeds", "1", "2")
    assert both.returncode == 0, both.stdout + both.stderr
    assert both.stdout.count("done before") == 2
    table = rows(both.stdout)
    assert table["float32, seed 1"] == alone["float32, seed 1"]
    # the least that could be asked of it: another precision changes less than another seed
    nearer, farther = (
        table["bfloat16 from float32, the same seed"],
        table["float32, from seed to seed"],
    )
    assert nearer[0] < farther[0]

    others = precision("--seeds", "1", "--points", "4")
    assert others.returncode == 2
    assert "holds a precision with other settings" in others.stderr


def test_what_has_no_validation_is_refused_before_it_trains(precision, tmp_path):
    done = precision("--seeds", "1", validated=False)
    assert done.returncode == 2
    assert "DATA.VAL_CAPTIONS" in done.stderr
    assert not (tmp_path / "out").exists()
