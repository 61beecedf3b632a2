"""All tensors of a pretraining checkpoint into a model, or none."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from pretrain.methods.captioning.tokenizer import Tokenizer
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.safe_load import read_checkpoint

# In a checkpoint's record of what its run was (`identity.RunIdentity`).
TOKENIZER_KEY = "the tokenizer's sha256"

logger = logging.getLogger(__name__)


def load_weights(objective: nn.Module, path: str, tokenizer: Tokenizer | None = None) -> None:
    """Every tensor of a pretraining checkpoint (ours or VirTex's) into the objective.

    Args:
        objective: the model.
        path: the checkpoint.
        tokenizer: what turns words into the model's numbers; None where it has no words.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = objective.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(
            f"MODEL.WEIGHTS {path} is not of this model (MODEL.OBJECTIVE "
            f"{type(objective).__name__}): {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Nothing was loaded. MODEL.VISUAL.NAME, MODEL.TEXTUAL.* "
            "and the tokenizer must be those of the checkpoint."
        )
    if tokenizer is not None:
        _check_tokenizer(checkpoint, path, tokenizer)
    objective.load_state_dict(state)
    logger.info("Loaded all %d tensors of %s.", len(own), path)


def _check_tokenizer(checkpoint: Mapping[str, Any], path: str, tokenizer: Tokenizer) -> None:
    """Another vocabulary of the same size fits every tensor, and means other words by each."""
    trained_with = checkpoint.get("run", {}).get("data", {}).get(TOKENIZER_KEY)
    if trained_with is not None and trained_with != tokenizer.sha256[:12]:
        raise InputError(
            f"{path}: was trained with another tokenizer (sha256 {trained_with}...) than this one "
            f"({tokenizer.sha256[:12]}...), whose numbers mean other words. Nothing was loaded. "
            "Give the tokenizer.model that lies in the folder of its run."
        )
