"""All tensors of a pretraining checkpoint into a method, or none."""

import logging
from collections.abc import Mapping

from torch import nn

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_checkpoint

logger = logging.getLogger(__name__)


def load_weights(
    method: nn.Module, path: str, identity: Mapping[str, str] = {}, fresh: tuple[str, ...] = ()
) -> None:
    """Load every tensor of a pretraining checkpoint (ours or VirTex's).

    Args:
        method: the model.
        path: the checkpoint.
        identity: what the outputs mean: `Samples.identity`.
        fresh: prefixes of tensors that stay as they are, in the checkpoint or not.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(fresh)}
    whole = method.state_dict()
    own = {name: tensor for name, tensor in whole.items() if not name.startswith(fresh)}
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
            f"{type(method).__name__}): {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Nothing was loaded. MODEL.VISUAL.NAME, MODEL.TEXTUAL.* "
            "and the tokenizer must be those of the checkpoint."
        )
    # another vocabulary of the same size fits every tensor, and means other words by each
    trained_with = checkpoint.get("run", {}).get("data", {})
    for what, here in identity.items():
        if trained_with.get(what, here) != here:
            raise InputError(
                f"{path}: was trained with another vocabulary ({what} was {trained_with[what]}, "
                f"here it is {here}), whose numbers mean other words. Nothing was loaded. Give "
                "what the model was trained with: tokenizer.model lies in the folder of its run."
            )
    method.load_state_dict({**whole, **state})
    logger.info("Loaded all %d tensors of %s.", len(own), path)
    if len(own) < len(whole):
        left = [name for name in whole if name not in own]
        logger.info("%d tensors start anew: %s", len(left), ", ".join(left))
