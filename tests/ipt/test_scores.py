"""PSNR and SSIM: the released code's numbers, known values, and a plain implementation."""

import math

import numpy as np
import pytest
import torch

from pretrain.methods.ipt.scores import psnr_rgb, psnr_y, score, smallest_side, ssim_y
from tests.ipt import cases


def test_psnr_is_that_of_the_released_code():
    case = cases.read_case("ipt_psnr")
    assert len(case["cases"]) == 4
    for one in case["cases"]:
        clean = cases.pixels(case, one["shape"], one["seed"])
        noise = case["weights"].features("noise", one["shape"], one["seed"])
        restored = clean + 7.3 * torch.from_numpy(noise) + 0.2
        border = one["scale"] if one["scale"] > 1 else 0
        assert psnr_y(restored[0], clean[0], border) == pytest.approx(one["psnr_y"], abs=1e-5)
        assert psnr_rgb(restored[0], clean[0], border) == pytest.approx(one["psnr_rgb"], abs=1e-5)


def _images(height=40, width=33, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (3, -(-height // 8), -(-width // 8)))
    clean = np.kron(coarse, np.ones((8, 8)))[:, :height, :width]
    return torch.from_numpy(clean), torch.from_numpy(clean + rng.normal(0, 20, clean.shape))


def test_known_values():
    clean = torch.full((3, 30, 30), 100)
    # a level is 20 log10(255) dB; of the luma, where 255 levels of grey are 219, 1.32 more
    assert psnr_rgb(clean + 1, clean, 0) == pytest.approx(20 * math.log10(255))
    assert psnr_y(clean + 1, clean, 0) == pytest.approx(20 * math.log10(255 / (219.859 / 256)))
    assert psnr_y(clean + 0.4, clean, 0) == math.inf  # is rounded
    assert psnr_rgb(clean - 500, clean, 0) == pytest.approx(20 * math.log10(255 / 100))  # clipped
    assert ssim_y(clean, clean, 0) == pytest.approx(1)
    # without variances SSIM is the term of the means alone
    luma = 219.859 / 256 * np.array([100, 150]) + 16
    means = (2 * luma[0] * luma[1] + 2.55**2) / (luma[0] ** 2 + luma[1] ** 2 + 2.55**2)
    assert ssim_y(clean + 50, clean, 0) == pytest.approx(means)


def test_the_border_is_left_out():
    clean, restored = _images()
    damaged = restored.clone()
    damaged[:, :3], damaged[:, :, -3:] = 0, 255
    assert score(damaged, clean, 3) == score(restored, clean, 3)
    assert score(damaged, clean, 2) != score(restored, clean, 2)
    assert score(restored, clean, 3) == (
        *(psnr_y(restored, clean, 3), psnr_rgb(restored, clean, 3), ssim_y(restored, clean, 3)),
    )


def _plain_ssim(restored, clean):
    """SSIM by its definition, a window at a time."""

    def luma(image):
        red, green, blue = np.clip(np.round(image), 0, 255)
        return 16 + (65.738 * red + 129.057 * green + 25.064 * blue) / 256

    x, y = luma(restored.numpy()), luma(clean.numpy())
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11] for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 2.55**2)
                * (2 * both + 7.65**2)
                / ((mean_a**2 + mean_b**2 + 2.55**2) * (var_a + var_b + 7.65**2))
            )
    return np.mean(values)


@pytest.mark.parametrize("height", [40, 70, 139])  # in one band, and in several
def test_ssim_is_what_its_definition_gives(height):
    clean, restored = _images(height)
    expected = _plain_ssim(restored, clean)
    assert 0.3 < expected < 0.95
    assert ssim_y(restored, clean, 0) == pytest.approx(expected, rel=1e-9)


def test_psnr_of_a_large_image_is_that_of_all_its_pixels():
    clean, restored = _images(150, 30)
    error = (restored.clamp(0, 255).round() - clean.round()).square().mean().item()
    assert psnr_rgb(restored, clean, 0) == pytest.approx(10 * math.log10(255**2 / error))


def test_what_cannot_be_compared_is_refused():
    image = torch.zeros(3, 20, 20)
    with pytest.raises(ValueError, match=r"\(3, 20, 20\) and \(3, 20, 21\)"):
        psnr_y(image, torch.zeros(3, 20, 21), 0)
    with pytest.raises(ValueError, match="two images"):
        psnr_y(image[None], image[None], 0)
    with pytest.raises(ValueError, match="nothing is left of 20x20 within a border of 10"):
        psnr_rgb(image, image, 10)
    with pytest.raises(ValueError, match="11 pixels a side"):
        ssim_y(image, image, 5)
    assert smallest_side(4) == 19
    assert ssim_y(image[:, 1:, 1:], image[:, 1:, 1:], 4) == 1
