"""PSNR and SSIM as papers on restoration give them: of whole levels, and without the border.

IPT's `calc_psnr` (huawei-noah/Pretrained-IPT, `utility.py`), whose published figures, of denoising
too, are of the luma. Grey images are scored as RGB with three equal channels, as there.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ITU-R BT.601 with 8 bits: luma from 16 to 235 of RGB from 0 to 255, in shares of 256.
_LUMA = (65.738, 129.057, 25.064)
_BLACK = 16
_ROWS = 64  # at a time, so that a large image takes little more than itself
_PEAK = 255
# Wang et al. 2004, section III.C
WINDOW = 11  # pixels
_SIGMA = 1.5  # pixels
_STABLE = ((0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2)


class Scores(NamedTuple):
    """Of one restored image."""

    psnr_y: float  # dB; infinite where nothing differs, as psnr_rgb
    psnr_rgb: float
    ssim: float  # of the luma, at most 1


def score(restored: torch.Tensor, clean: torch.Tensor, border: int) -> Scores:
    """All scores of an image; arguments as in `psnr_y`."""
    pair = (restored, clean, border)
    return Scores(psnr_y(*pair), psnr_rgb(*pair), ssim_y(*pair))


def psnr_y(restored: torch.Tensor, clean: torch.Tensor, border: int) -> float:
    """PSNR of the luma in dB.

    Args:
        restored, clean: (3, H, W) RGB on the scale 0-255, any dtype; are clipped and rounded.
        border: pixels that are left out on each side: the scale for enlarged images, else 0.

    Raises:
        ValueError: the shapes are no such, differ, or nothing is left within the border.
    """
    return _psnr(_luma(a - b) for a, b in _bands(restored, clean, border))


def psnr_rgb(restored: torch.Tensor, clean: torch.Tensor, border: int) -> float:
    """PSNR over all three channels in dB; arguments as in `psnr_y`."""
    return _psnr(a - b for a, b in _bands(restored, clean, border))


def ssim_y(restored: torch.Tensor, clean: torch.Tensor, border: int) -> float:
    """Mean structural similarity of the luma (Wang et al. 2004): Gaussian windows of 11 pixels and
    deviation 1.5, those alone that lie within the image. Arguments as in `psnr_y`.
    """
    height, width = (side - 2 * border for side in clean.shape[1:])
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side, found {width}x{height}")
    bands = _bands(restored, clean, border, more=WINDOW - 1)
    # the last rows may be a band that has no window of its own
    total = sum(_ssim(a, b).sum().item() for a, b in bands if a.shape[1] >= WINDOW)
    return total / ((height - WINDOW + 1) * (width - WINDOW + 1))


def smallest_side(border: int) -> int:
    """Pixels that an image's shorter side must have to be scored."""
    return WINDOW + 2 * border


def _bands(
    restored: torch.Tensor, clean: torch.Tensor, border: int, more: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Whole levels of both images in float64 within the border, some rows at a time.

    Args:
        restored, clean, border: as in `psnr_y`.
        more: rows of the next band that each band has besides its own.
    """
    if restored.shape != clean.shape or restored.dim() != 3 or len(restored) != 3:
        raise ValueError(
            f"expected two images (3, H, W), found {tuple(restored.shape)} and {tuple(clean.shape)}"
        )
    height, width = clean.shape[1:]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f"nothing is left of {width}x{height} within a border of {border}")
    for top in range(border, height - border, _ROWS):
        rows = slice(top, min(top + _ROWS + more, height - border))
        parts = (image[:, rows, border : width - border] for image in (restored, clean))
        # of one layout, in which sums are rounded alike
        a, b = (part.double().contiguous().clamp(0, _PEAK).round() for part in parts)
        yield a, b


def _luma(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (H, W), without the offset of black."""
    return torch.tensordot(image.new_tensor(_LUMA) / 256, image, 1)


def _psnr(differences: Iterable[torch.Tensor]) -> float:
    total = count = 0
    for part in differences:
        total += part.square().sum().item()
        count += part.numel()
    return math.inf if total == 0 else 10 * math.log10(_PEAK**2 * count / total)


def _ssim(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (H - 10, W - 10), of every window."""
    x, y = _luma(restored) + _BLACK, _luma(clean) + _BLACK
    x_mean, y_mean, xx, yy, xy = _blurred(torch.stack([x, y, x * x, y * y, x * y]))
    covariance = xy - x_mean * y_mean
    variances = xx - x_mean**2 + yy - y_mean**2
    c1, c2 = _STABLE
    alike = (2 * x_mean * y_mean + c1) * (2 * covariance + c2)
    return alike / ((x_mean**2 + y_mean**2 + c1) * (variances + c2))


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """(N, H, W) -> (N, H - 10, W - 10): weighted means over SSIM's window."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    blurred = F.conv2d(maps[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(blurred, weights.view(1, 1, 1, -1))[:, 0]
