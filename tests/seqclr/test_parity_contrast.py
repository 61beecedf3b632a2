"""The numbers that the released code of SeqCLR's authors computed: NT-Xent, projections, instances.

Every `seqclr_*.json` of every folder in $METHOD_PARITY_CASES (separated by ":"; default
`../shared/parity_methods`) is computed again.
"""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.methods.seqclr.loss import build_projection, instances_of, nt_xent

SHARED = Path(__file__).resolve().parents[3] / "shared" / "parity_methods"
FOLDERS = os.environ.get("METHOD_PARITY_CASES", str(SHARED)).split(":")
CASES = [
    pytest.param(path, case, id=f"{path.stem}-{case.get('name', number)}")
    for folder in FOLDERS
    for path in sorted(Path(folder).glob("seqclr_*.json"))
    for number, case in enumerate(json.loads(path.read_text())["cases"])
]


def test_cases_are_there():
    if not CASES and os.environ.get("REQUIRE_REAL_DATA") != "1":
        pytest.skip(f"no seqclr_*.json in {FOLDERS}; set METHOD_PARITY_CASES to run this test")
    assert CASES, f"no seqclr_*.json in {FOLDERS}"


def weights_of(path: Path):
    """The module beside the cases that makes their weights and inputs."""
    spec = importlib.util.spec_from_file_location("parity_weights", path.parent / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_ntxent(path: Path, case: dict) -> None:
    known = {"images", "instances", "channels", "temperature", "reduction", "seed", "name"}
    known |= {"loss", "loss_float32", "grad_view0_norm", "grad_view1_norm", "grad_view0_head"}
    assert case.keys() <= known
    shape = [case["images"], case["instances"], case["channels"]]
    make = weights_of(path).features
    first = make("view0", shape, case["seed"])
    # in float32, as the cases were made
    second = 0.7 * first + 0.7 * make("view1", shape, case["seed"])
    anchors = 2 * case["images"] * case["instances"]
    factor = {
        "batchmean": 1.0,
        "sum": anchors,
        "mean_instances_per_image": anchors / case["instances"],
    }[case["reduction"]]

    views = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (first, second)]
    loss = factor * nt_xent(*views, case["temperature"])[0]
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    for number, view in enumerate(views):
        assert view.grad.norm().item() == pytest.approx(case[f"grad_view{number}_norm"], rel=1e-6)
    head = views[0].grad.flatten()[:6].numpy()
    np.testing.assert_allclose(head, case["grad_view0_head"], atol=1e-7 * factor, rtol=1e-6)

    ours = factor * nt_xent(*(v.detach().float() for v in views), case["temperature"])[0]
    # better than what the released code has in float32
    assert ours.item() == pytest.approx(case["loss"], rel=1e-5)
    assert ours.item() == pytest.approx(case["loss_float32"], rel=1e-3)


def check_instances(path: Path, case: dict) -> None:
    make, given = weights_of(path), dict(case["configuration"])
    frames = torch.from_numpy(make.features(case["input"], case["input_shape"], case["seed"]))
    flattened = frames.ndim == 4
    if flattened:  # (N, C, H, W): rows behind each other, as that code has them
        height = frames.shape[2]
        averaged = frames.mean(2).transpose(1, 2)
        frames = frames.flatten(2).transpose(1, 2)
    kind = given.pop("model_proj_scheme", "none")
    kind = {"linear_per_column": "linear", None: "none"}.get(kind, kind)
    size = frames.shape[2]
    hidden = given.pop("model_proj_hidden", size)
    projection = build_projection(kind, size, hidden, given.pop("model_proj_output", size))
    state = make.state_dict(case["shapes"], case["seed"])
    projection.load_state_dict(
        {name.removeprefix("projection."): torch.from_numpy(t) for name, t in state.items()}
    )
    width = given.pop("model_instance_mapping_w", None)
    fixed = given.pop("model_instance_mapping_fixed", None)
    if given.pop("model_instance_mapping_frame_to_instance", False):
        asked = ("frame",)
    else:
        asked = {"instances": ("window", width), "frames": ("window", 0, width)}[fixed]
    assert not given, "an option that is not known"

    def agrees(frames: torch.Tensor) -> bool:
        with torch.no_grad():
            found = instances_of(projection(frames), *asked).numpy()
        assert list(found.shape) == case["expected"]["shape"]
        norm = case["expected"]["norm"]
        second = found[0, min(1, found.shape[1] - 1)]
        places = {"first": found[0, 0, :6], "second": second[:6], "last": found[-1, -1, :6]}
        assert case["expected"].keys() <= {"shape", "norm", *places}
        close = [math.isclose(float(np.linalg.norm(found)), norm, rel_tol=1e-5)]
        close += [
            np.allclose(value, case["expected"][name], rtol=0, atol=1e-5 * norm)
            for name, value in places.items()
            if name in case["expected"]
        ]
        return all(close)

    assert agrees(frames)
    if fixed == "instances" and width == 1:
        torch.testing.assert_close(instances_of(frames, "window", 1), instances_of(frames, "all"))
    if flattened:
        assert agrees(averaged) == (height == 1), "ours are windows of columns"


KINDS = {"seqclr_ntxent": check_ntxent, "seqclr_instances": check_instances}


@pytest.mark.parametrize(("path", "case"), CASES)
def test_it_computes_what_the_released_code_does(path, case):
    kind = next((check for name, check in KINDS.items() if path.stem.startswith(name)), None)
    assert kind, f"{path}: cases of a kind that is not known"
    kind(path, case)
