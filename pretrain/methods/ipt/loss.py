"""The contrast of tokens: those of an image are alike, and unlike those of other images.

IPT (arXiv 2012.00364, section 3.3, equation 5).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Similarities that are in memory at a time, in the forward and again in the backward pass: 128 MiB.
_AT_A_TIME = 2**25


def patch_contrast(tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tell an image's tokens from those of the batch's other images.

    Each token is an anchor. With s its cosines to all other tokens over the temperature, its loss
    is the mean over those of its image of -s_j + logsumexp(s); the result is the mean over anchors.

    Args:
        tokens: (N, T, D), T at least 2.
        temperature: positive.

    Returns:
        Scalar, float32 or the tokens' higher precision.
    """
    images, count = tokens.shape[:2]
    with torch.autocast(tokens.device.type, enabled=False):
        wide = tokens if tokens.dtype == torch.float64 else tokens.float()
        z = F.normalize(wide, dim=2)
        # mean cosine to the image's other tokens: of all, the token's own with itself left out
        own = (z * z.sum(1, keepdim=True)).sum(2) - z.square().sum(2)  # (N, T)
        alike = own.mean() / (count - 1)
        rows = z.flatten(0, 1)  # (N T, D)
        size = max(1, _AT_A_TIME // len(rows))
        among = [
            checkpoint(_log_sum, rows, first, size, temperature, use_reentrant=False)
            for first in range(0, images * count, size)
        ]
        return torch.cat(among).mean() - alike / temperature


def _log_sum(rows: torch.Tensor, first: int, size: int, temperature: float) -> torch.Tensor:
    """Of `size` rows from `first` on: logsumexp of their similarities to all others."""
    some = rows[first : first + size]
    similar = some @ rows.T / temperature  # (size, N T)
    similar.diagonal(first).fill_(-torch.inf)  # each to itself
    return similar.logsumexp(1)
