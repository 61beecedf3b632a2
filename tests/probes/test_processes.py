"""Probes in several processes."""

import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "linear_probe.py"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["linear", "finetune"])
def test_two_processes_train_one_classifier(run_python, folders, thin_backbone, tmp_path, task):
    shared = [
        *("TASK", task, "DATA.FORMAT", "folders", "DATA.TRAIN", "train", "DATA.TEST", "val"),
        *("DATA.ROOT", folders, "DATA.NUM_WORKERS", "0", "DATA.CACHE_DIR", tmp_path / "cache"),
        *("MODEL.WEIGHTS", thin_backbone(), "MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "1e-4"),
        *("SOLVER.EPOCHS", "3", "SOLVER.IMS_PER_BATCH", "8", "INPUT.RESIZE", "36"),
        *("INPUT.CROP", "32"),
    ]
    ends = []
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        process = run_python(TOOL, *shared, "OUTPUT_DIR", folder, processes=processes)
        assert process.returncode == 0, process.stderr
        results = json.loads((folder / "results.json").read_text())
        assert sum(row["images"] for row in results["per_class"]) == 12, "each image once"
        ends.append(torch.load(folder / "model_final.pth", weights_only=True)["model"])
    if task == "linear":  # norms of a trained backbone see each process's own images
        assert torch.allclose(ends[0]["weight"], ends[1]["weight"], rtol=1e-3, atol=1e-6)
