"""All tensors of a pretraining checkpoint into a model, or none."""

import logging

from torch import nn

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_checkpoint

logger = logging.getLogger(__name__)


def load_weights(objective: nn.Module, path: str) -> None:
    """Every tensor of a pretraining checkpoint (ours or VirTex's) into the objective.

    Raises:
        InputError: the file is missing or unreadable, or a tensor is missing, left over or of
            another shape.
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
    objective.load_state_dict(state)
    logger.info("Loaded all %d tensors of %s.", len(own), path)
