"""IPT with the weights of a case gives the numbers that the released code gave."""

import json

import numpy as np
import pytest
import torch

from pretrain.methods.ipt.network import build_ipt, sizes_of
from tests.ipt.cases import FILES, names, pixels, read_case, state_of

# PSNR, tiles and the self-ensemble are compared where they are computed.
KINDS = {"tasks", "tiled", "self_ensemble"}


def close(found: torch.Tensor, expected: dict) -> None:
    """Compare shape, norm, mean and the listed values, by the size of the elements."""
    found = found.double()
    assert list(found.shape) == expected["shape"]
    assert found.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
    allowed = 1e-5 * expected["norm"] / found.numel() ** 0.5
    if "mean" in expected:
        assert found.mean().item() == pytest.approx(expected["mean"], abs=allowed)
    first, last = found[(0,) * (found.ndim - 1)], found[(-1,) * (found.ndim - 1)]
    for key, part in (("head", first[:8]), ("tail", last[-4:])):
        if key in expected:
            values = expected[key][: len(part)]
            np.testing.assert_allclose(part, values, rtol=1e-5, atol=10 * allowed)


def test_every_case_is_of_a_kind_that_is_compared():
    for file in FILES:
        case = json.loads(file.read_text())
        known = KINDS >= case["expected"].keys() if "expected" in case else file.stem == "ipt_psnr"
        assert known, f"{file}: nothing here compares all that it expects"


@pytest.mark.parametrize("name", names("tasks"))
def test_forward_passes_match_the_released_code(name):
    case = read_case(name)
    options, state = case["arguments"], state_of(case)
    positions = "every" if options["pos_every"] else "once"
    sizes = sizes_of(state, name, options["num_heads"], positions)
    assert sizes.scales == tuple(options["scale"])
    assert (sizes.features, sizes.patch) == (options["n_feats"], options["patch_size"])
    assert (sizes.layers, sizes.mlp) == (options["num_layers"], not options["no_mlp"])
    assert sizes.positions == ("none" if options["no_pos"] else positions)
    network = build_ipt(state, sizes, name)

    patch = options["patch_size"]
    images = pixels(case, [case["batch"], 3, patch, patch], case["seed"])
    for expected in case["expected"]["tasks"]:
        task = expected["task"]
        with torch.inference_mode():
            output, tokens = network.restore(images, task)
            seen = network.head[task](network.sub_mean(images))
            mended, _ = network.body(seen, task)
        found = {"output": output, "tokens": tokens, "head": seen, "body": mended}
        assert expected["scale"] == sizes.scales[task]
        assert {"output", "tokens"} <= expected.keys()
        for key in found.keys() & expected.keys():
            close(found[key], expected[key])
