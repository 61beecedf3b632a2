"""Contrast between parts of words: which frames make an instance, and NT-Xent over instances.

SeqCLR (Aberdam et al., arXiv 2012.10873, sections 3.3 and 3.4); where the paper is silent, its
authors' later code (amazon-research/semimtr-text-recognition, `modules/seqclr_proj.py`,
`losses/seqclr_loss.py`). That code flattens a map of several rows before it pools, so that its
windows are bands of rows; here a map's height is averaged first, and windows are of columns.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.methods.method import gather_instances
from pretrain.methods.seqclr.encoder import BiLSTM

MAPPINGS = ("all", "window", "frame")
PROJECTIONS = ("none", "linear", "mlp", "bilstm")


def build_projection(kind: str, in_features: int, hidden: int, out_features: int) -> nn.Module:
    """(N, T, in_features) -> (N, T, out_features); thrown away after pretraining.

    Args:
        kind: of `PROJECTIONS`; "linear" and "mlp" see a frame each, "bilstm" the word, and "none"
            leaves the frames as they are.
        hidden: of "mlp" and "bilstm".

    Raises:
        ValueError: another kind.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "mlp":
        layers = nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features)
        return nn.Sequential(*layers)
    if kind == "bilstm":
        return BiLSTM(in_features, hidden, out_features)
    raise ValueError(f"{kind!r} is none of {', '.join(PROJECTIONS)}")


def instances_of(
    frames: torch.Tensor, mapping: str, windows: int = 5, window_frames: int = 0
) -> torch.Tensor:
    """Make instances of frames.

    Args:
        frames: (N, T, C).
        mapping: "all": the mean over frames; "frame": each; "window": the mean over stretches.
        windows: how many stretches: the i-th is of the frames from floor(i T / windows) on, and
            before ceil((i + 1) T / windows), so that they may share some.
        window_frames: stretches are of so many frames instead, side by side; what is left at the
            end belongs to none.

    Returns:
        (N, instances, C).
    """
    if mapping == "frame":
        return frames
    columns = frames.transpose(1, 2)  # (N, C, T)
    if mapping == "window" and window_frames:
        pooled = F.avg_pool1d(columns, window_frames)
    else:
        pooled = F.adaptive_avg_pool1d(columns, windows if mapping == "window" else 1)
    return pooled.transpose(1, 2)


def nt_xent(
    one: torch.Tensor, other: torch.Tensor, temperature: float, gather: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell each instance's pair, which has its index in the other view, among all of both views.

    Cosine similarity over the temperature, an anchor itself left out, in float32 or better.

    Args:
        one, other: (N, T, C) instances of the two views.
        temperature: positive.
        gather: compare with the instances of all processes, with their gradients. Collective.

    Returns:
        Mean over the anchors (2 N T of this process) of the cross-entropy in nats, and of whether
        the most similar instance is the pair.
    """
    with torch.autocast(one.device.type, enabled=False):
        own = torch.cat([one.flatten(0, 1), other.flatten(0, 1)])  # (2 N T, C)
        if own.dtype in (torch.float16, torch.bfloat16):
            own = own.float()
        own = F.normalize(own, dim=1)
        # a process's rows stay together: pairs are half of them apart
        among, first = gather_instances(own) if gather else (own, 0)
        logits = own @ among.T / temperature  # (2 N T, all)
        anchors = torch.arange(len(own), device=own.device)
        logits = logits.scatter(1, first + anchors[:, None], float("-inf"))
        pairs = first + anchors.roll(len(own) // 2)
        found = (logits.detach().argmax(1) == pairs).float().mean()
        return F.cross_entropy(logits, pairs), found
