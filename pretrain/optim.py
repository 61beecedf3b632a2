"""Parameter groups, learning-rate schedule and Lookahead, as in VirTex's released recipe."""

import math
import re

import torch
from detectron2.config import CfgNode
from torch import nn

from pretrain.backbone import last_scales
from virtex_d2.engine.errors import InputError, nearest

OPTIMIZERS = ("sgd", "adamw", "adadelta")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Groups by learning rate and weight decay (or none), each parameter once.

    A group carries `name`: "cnn", "cnn_no_decay", "rest" or "rest_no_decay"; with
    SOLVER.SCALE_LR_FACTOR also "scales" or "scales_no_decay", of `backbone.last_scales`.
    """
    groups: dict[str, dict] = {}
    factor = cfg.SOLVER.SCALE_LR_FACTOR
    scales = {id(scale) for scale in last_scales(model)} if factor != 1 else set()
    rates = {"cnn": cfg.SOLVER.CNN_LR, "rest": cfg.SOLVER.BASE_LR}
    rates["scales"] = cfg.SOLVER.CNN_LR * factor
    no_decay = re.compile(cfg.SOLVER.NO_DECAY) if cfg.SOLVER.NO_DECAY else None
    for name, parameter in model.named_parameters():  # shared parameters come once
        if not parameter.requires_grad:
            continue
        kind = "cnn" if "visual.cnn." in name else "rest"
        if kind == "cnn" and id(parameter) in scales:
            kind = "scales"
        is_decayed = no_decay is None or not no_decay.match(name)
        key = kind + ("" if is_decayed else "_no_decay")
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr": rates[kind],
                "weight_decay": cfg.SOLVER.WEIGHT_DECAY if is_decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(cfg: CfgNode, groups: list[dict]) -> torch.optim.Optimizer:
    """SGD with momentum, AdamW or Adadelta (Zeiler, arXiv 1212.5701; rho 0.95) over groups such as
    `parameter_groups` makes.
    """
    name, base_lr = cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR
    factor = cfg.SOLVER.SCALE_LR_FACTOR
    if not (math.isfinite(factor) and factor > 0):
        raise InputError(f"SOLVER.SCALE_LR_FACTOR is {factor}; expected a number above 0.")
    if factor != 1 and not any(group["name"].startswith("scales") for group in groups):
        raise InputError(
            f"SOLVER.SCALE_LR_FACTOR {factor:g}: MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE} has no "
            "group of its residual blocks' last scales (`visual.cnn.`, `optim.parameter_groups`). "
            "Leave it at 1."
        )
    # One pass over the memory for all of an update. Not under a loss scaler: a fused step is called
    # for updates that it skips, too, and Lookahead would count them.
    fused = not (cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16")
    if name == "sgd":
        # torch 2.4's refuses channels last where a side is 1: it compares strides that do not count
        fused = fused and torch.__version__ >= (2, 5)
        return torch.optim.SGD(groups, lr=base_lr, momentum=cfg.SOLVER.MOMENTUM, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=base_lr, betas=tuple(cfg.SOLVER.BETAS), fused=fused)
    if name == "adadelta":  # epsilon as usual where words are read: torch's 1e-6 starts faster
        return torch.optim.Adadelta(groups, lr=base_lr, rho=0.95, eps=1e-8)
    raise InputError(
        f"SOLVER.OPTIMIZER: {name!r} is not one of {', '.join(OPTIMIZERS)}."
        + nearest(name, OPTIMIZERS)
    )


def warmup_cosine(iteration: int, warmup_iters: int, max_iter: int) -> float:
    """Factor on the learning rate: linear from 0 over the warm-up, then half a cosine to 0."""
    if iteration < warmup_iters:
        return iteration / warmup_iters
    progress = (iteration - warmup_iters) / max(1, max_iter - warmup_iters)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """`warmup_cosine` on every group; step it once after each iteration."""
    warmup, last = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    # iteration 0 would otherwise be a step of length 0
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: warmup_cosine(i + 1 if i < warmup else i, warmup, last)
    )


class Lookahead:
    """Slow weights beside an optimizer's fast ones (Zhang et al., arXiv 1907.08610).

    Every `steps` updates slow += alpha * (fast - slow), and the fast weights restart from there.
    It hangs on the optimizer's own step, so that an update which a gradient scaler skips is not
    counted. Its state belongs in the checkpoint: without it a resumed run's loss jumps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int = 5, alpha: float = 0.5):
        if steps < 1 or not 0 < alpha <= 1:
            raise InputError(
                "SOLVER.LOOKAHEAD: expected STEPS >= 1 and 0 < ALPHA <= 1, found "
                f"STEPS {steps}, ALPHA {alpha}."
            )
        self.steps = steps
        self.alpha = alpha
        self._fast = [p for group in optimizer.param_groups for p in group["params"]]
        self.restart()
        optimizer.register_step_post_hook(lambda *_: self._after_update())

    def restart(self) -> None:
        """Begin at the present weights: where others have been loaded since."""
        self.updates = 0
        self._slow = [p.detach().clone() for p in self._fast]

    @torch.no_grad()
    def _after_update(self) -> None:
        self.updates += 1
        if self.updates % self.steps == 0:
            torch._foreach_lerp_(self._slow, self._fast, self.alpha)
            torch._foreach_copy_(self._fast, self._slow)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "slow": self._slow}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Copy the slow weights and the update count of a checkpoint.

        Raises:
            ValueError: the state is of another set of parameters.
        """
        if [s.shape for s in state["slow"]] != [s.shape for s in self._slow]:
            raise ValueError("Lookahead's slow weights in the checkpoint are of another model.")
        self.updates = state["updates"]
        for mine, theirs in zip(self._slow, state["slow"], strict=True):
            mine.copy_(theirs)
