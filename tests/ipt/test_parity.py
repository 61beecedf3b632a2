"""IPT with the weights of a case gives the numbers that the released code gave."""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.methods.ipt.network import build_ipt, sizes_of

FOLDERS = os.environ.get("METHOD_PARITY_CASES", "../shared/parity_methods").split(os.pathsep)
ROOT = Path(__file__).resolve().parents[2]
FILES = [
    file
    for folder in FOLDERS
    for file in sorted((ROOT / folder).glob("ipt_*.json"))
    if "shapes" in json.loads(file.read_text())
]


@cache
def weights_module(folder: Path):
    spec = importlib.util.spec_from_file_location("method_weights", folder / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: torch.Tensor, expected: dict) -> None:
    """Compare shape, norm, mean and the listed values, relative to the whole's size."""
    found = found.double()
    assert list(found.shape) == expected["shape"]
    assert found.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
    allowed = 1e-5 * expected["norm"] / found.numel() ** 0.5
    if "mean" in expected:
        assert found.mean().item() == pytest.approx(expected["mean"], abs=allowed)
    head = found[(0,) * (found.ndim - 1)][:8]
    assert np.linalg.norm(head - torch.tensor(expected["head"])) < 1e-5 * expected["norm"]
    if "tail" in expected:
        tail = found[(-1,) * (found.ndim - 1)][-4:]
        assert np.linalg.norm(tail - torch.tensor(expected["tail"])) < 1e-5 * expected["norm"]


def test_there_are_cases():
    if not FILES and os.environ.get("REQUIRE_REAL_DATA") != "1":
        pytest.skip(f"no ipt_*.json in {FOLDERS}: METHOD_PARITY_CASES names the folders")
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_forward_passes_match_the_released_code(file):
    case, weights = json.loads(file.read_text()), weights_module(file.parent)
    options = case["arguments"]
    arrays = weights.state_dict(case["shapes"], case["seed"], case["fixed"], case["linear"])
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    positions = "every" if options["pos_every"] else "once"
    sizes = sizes_of(state, file.name, options["num_heads"], positions)
    assert sizes.scales == tuple(options["scale"])
    assert (sizes.features, sizes.patch) == (options["n_feats"], options["patch_size"])
    assert (sizes.layers, sizes.mlp) == (options["num_layers"], not options["no_mlp"])
    assert sizes.positions == ("none" if options["no_pos"] else positions)
    network = build_ipt(state, sizes, file.name)

    patch = options["patch_size"]
    pixels = torch.from_numpy(weights.pixels([case["batch"], 3, patch, patch], case["seed"]))
    for expected in case["expected"]["tasks"]:
        with torch.inference_mode():
            output, tokens = network.restore(pixels, expected["task"])
            seen = network.head[expected["task"]](network.sub_mean(pixels))
            mended, _ = network.body(seen, expected["task"])
        close(output, expected["output"])
        close(tokens, expected["tokens"])
        close(seen, expected["head"])
        close(mended, expected["body"])
