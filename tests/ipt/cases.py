"""Numbers of the released code, and the networks that they are of; a test skips without them."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.methods.ipt.network import IPT, Sizes, build_ipt
from tests.conftest import ROOT

_DEFAULT = ROOT.parent / "shared" / "parity_methods"
FOLDERS = [Path(p) for p in os.environ.get("METHOD_PARITY_CASES", "").split(os.pathsep) if p]
FOLDERS = FOLDERS or [_DEFAULT]
FILES = [file for folder in FOLDERS for file in sorted(folder.glob("ipt_*.json"))]


def read_case(name: str) -> dict:
    """The case of this name; its `weights` is the module that makes its tensors."""
    for file in FILES:
        if file.stem == name:
            spec = importlib.util.spec_from_file_location("weights", file.with_name("weights.py"))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return {**json.loads(file.read_text()), "weights": module}
    message = f"no {name}.json in {', '.join(map(str, FOLDERS))}: set METHOD_PARITY_CASES"
    if os.environ.get("REQUIRE_REAL_DATA") == "1":
        pytest.fail(f"REQUIRE_REAL_DATA=1, but {message}")
    pytest.skip(message)


def names(key: str) -> list[str]:
    """Of the cases that have numbers of this kind; one that is missing where there are none."""
    found = [file.stem for file in FILES if key in json.loads(file.read_text()).get("expected", {})]
    return found or [f"ipt_with_{key}"]


def state_of(case: dict) -> dict[str, torch.Tensor]:
    arrays = case["weights"].state_dict(case["shapes"], case["seed"], case["fixed"], case["linear"])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def network_of(case: dict) -> IPT:
    given = case["arguments"]
    sizes = Sizes(
        scales=tuple(given["scale"]),
        features=given["n_feats"],
        patch=given["patch_size"],
        layers=given["num_layers"],
        heads=given["num_heads"],
        positions="none" if given["no_pos"] else "every" if given["pos_every"] else "once",
        mlp=not given["no_mlp"],
    )
    return build_ipt(state_of(case), sizes, case["name"])


def pixels(case: dict, shape: list[int], seed: int) -> torch.Tensor:
    return torch.from_numpy(case["weights"].pixels(shape, seed))


def assert_as(found: torch.Tensor, expected: dict, relative: float = 1e-5) -> None:
    """The numbers of an output are the released code's, by the size of its elements."""
    assert list(found.shape) == expected["shape"]
    size = expected["norm"] / np.sqrt(found.numel())
    assert found.double().norm().item() == pytest.approx(expected["norm"], rel=relative)
    assert found.double().mean().item() == pytest.approx(expected["mean"], abs=relative * size)
    for place, part in (("head", found[0, 0, 0, :8]), ("tail", found[-1, -1, -1, -4:])):
        np.testing.assert_allclose(part, expected[place][: len(part)], rtol=0, atol=relative * size)
