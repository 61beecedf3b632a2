"""The real line, at a length that teaches nothing."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_whole_line_runs_from_captions_to_a_report(tmp_path, run_python):
    output = tmp_path / "demo"
    result = run_python(
        ROOT / "tools" / "demo.py", "--output", output, "--scale", 0.005, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (output / "runs" / "seed1" / "pretrain" / "backbone.safetensors").is_file()
    for run, starts_from_captions in (("random", False), ("pretrained", True)):
        log = (output / "runs" / "seed1" / run / "log.txt").read_text()
        assert bool(re.search(r"265 of 265 backbone tensors set", log)) == starts_from_captions
        lines = (output / "runs" / "seed1" / run / "metrics.json").read_text().splitlines()
        assert any("segm/AP" in json.loads(line) for line in lines)
    for name in ("overview", "detectors", "masks", "captions", "pretraining"):
        with Image.open(output / f"{name}.png") as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 10
    assert (output / "overview.png").stat().st_size < 300_000
    assert "Mask AP" in (output / "report.html").read_text(encoding="utf-8")
    assert re.search(r"^Mask AP +\d", result.stdout, re.MULTILINE)
