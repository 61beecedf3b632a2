"""Beam search on VirTex-named state dicts gives the reference's captions and log-probabilities."""

import json
import math

import pytest
import torch

from pretrain.methods.captioning.decoding import beam_search
from pretrain.methods.method import build_method
from tests.parity.test_parity import FILES, _objective_config, _weights_module

MAX_WORDS = 30
CASES = [file for file in FILES if "beam_search" in json.loads(file.read_text())["expected"]]


def test_there_are_cases_with_captions(parity_cases):
    assert CASES, f"no case in {parity_cases} has expected.beam_search"


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_beam_search_matches_the_reference(file):
    case = json.loads(file.read_text())
    weights, expected, shapes = _weights_module(), case["expected"], case["shapes"]
    cfg = _objective_config(case["overrides"])
    cfg.MODEL.TEXTUAL.MAX_LENGTH = shapes["textual.embedding.positions.weight"][0]
    model = build_method(cfg, shapes["textual.output.weight"][0]).eval()
    state = weights.state_dict(shapes, case["ties"], case["seed"])
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    batch = weights.batch(**case["batch"], seed=case["seed"])

    with torch.no_grad():
        features = model.visual(torch.from_numpy(batch["image"]))
    decoded = beam_search(
        model.textual, features, expected["beam_size"], MAX_WORDS, with_attention=True
    )

    assert [caption.tokens for caption in decoded] == expected["beam_search"]
    logprobs = [caption.logprob for caption in decoded]
    assert logprobs == pytest.approx(expected["beam_search_logprob"], rel=1e-4)
    for caption in decoded:
        assert caption.attention.shape == (len(caption.tokens), *features.shape[2:])
        sums = caption.attention.sum((1, 2))
        assert all(math.isclose(value, 1, rel_tol=1e-5) for value in sums.tolist())
