"""Models built from VirTex-named state dicts give the numbers that VirTex's own code gave."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch

from pretrain.config import get_pretrain_cfg
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.methods.method import build_method
from tests.pretrain.recompute import hidden_states

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(os.environ.get("PARITY_CASES", ROOT.parent / "shared" / "parity"))
FILES = sorted(CASES.glob("*.json"))
RELATIVE = 1e-4


def _objective_config(overrides: list) -> object:
    cfg = get_pretrain_cfg()
    for key, value in zip(overrides[0::2], overrides[1::2], strict=True):
        if key == "MODEL.NAME":
            # "virtex" is the first releases' name of bicaptioning
            cfg.MODEL.OBJECTIVE = {"virtex": "bicaptioning"}.get(value, value)
        elif key == "MODEL.VISUAL.NAME":
            cfg.MODEL.VISUAL.NAME = value.removeprefix("torchvision::")
        elif key == "MODEL.TEXTUAL.NAME" and value != "none":
            norm, sizes = re.fullmatch(r"transdec_(\w+)norm::(.+)", value).groups()
            layers, width, heads, feedforward = (int(part[1:]) for part in sizes.split("_"))
            cfg.MODEL.TEXTUAL.NORM = norm
            cfg.MODEL.TEXTUAL.NUM_LAYERS = layers
            cfg.MODEL.TEXTUAL.HIDDEN_SIZE = width
            cfg.MODEL.TEXTUAL.ATTENTION_HEADS = heads
            cfg.MODEL.TEXTUAL.FEEDFORWARD_SIZE = feedforward
        elif key not in ("MODEL.TEXTUAL.NAME", "MODEL.VISUAL.FEATURE_SIZE"):
            raise AssertionError(f"a parity case overrides {key}, which this test does not know")
    return cfg


def _weights_module():
    spec = importlib.util.spec_from_file_location("parity_weights", CASES / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def case(request) -> dict:
    return json.loads(request.param.read_text())


def test_cases_are_there(parity_cases):
    assert FILES, f"no *.json in {parity_cases}"


def _batch(case: dict, weights) -> dict[str, torch.Tensor]:
    """The case's batch, with what its objective wants besides."""
    # the case's seed is the generator's for the batch, too
    arrays = weights.batch(**case["batch"], seed=case["seed"])
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tokens = batch["caption_tokens"]
    if "masking" in case["expected"]:
        place = re.match(r"position (\d+) of every caption replaced", case["expected"]["masking"])
        assert place, f"{case['name']}: a masking that this test does not know"
        column = int(place[1])
        batch["masked_tokens"], batch["masked_labels"] = tokens.clone(), torch.zeros_like(tokens)
        batch["masked_tokens"][:, column] = Tokenizer.mask_id
        batch["masked_labels"][:, column] = tokens[:, column]
    rows = [torch.unique(row[row > Tokenizer.mask_id]) for row in tokens]
    batch["labels"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return batch


def test_losses_logits_and_features_match_the_reference(case):
    cfg = _objective_config(case["overrides"])
    weights = _weights_module()
    expected = case["expected"]
    model = build_method(cfg, case["shapes"]["textual.output.weight"][0]).eval()
    state = weights.state_dict(case["shapes"], case["ties"], case["seed"])
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    batch = _batch(case, weights)

    with torch.no_grad():
        losses = {k.removeprefix("loss_"): v.item() for k, v in model(batch).items()}
        features = model.visual(batch["image"])

    assert list(features.shape) == expected["features_shape"]
    assert features.norm().item() == pytest.approx(expected["features_norm"], rel=RELATIVE)
    torch.testing.assert_close(
        features.flatten()[:8], torch.tensor(expected["features_head"]), rtol=RELATIVE, atol=1e-5
    )
    assert losses == pytest.approx(expected["loss_components"], rel=RELATIVE)
    assert sum(losses.values()) == pytest.approx(expected["loss"], rel=RELATIVE)
    if "logits_head" in expected:
        with torch.no_grad():
            visual_tokens = model.textual.project(features)
            hidden = hidden_states(model.textual, visual_tokens, batch["caption_tokens"])
            logits = model.textual.output(hidden)[0, 1, :8]
        torch.testing.assert_close(
            logits, torch.tensor(expected["logits_head"]), rtol=RELATIVE, atol=1e-5
        )
