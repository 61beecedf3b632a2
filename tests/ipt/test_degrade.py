"""Degradations: each as its definition says, and the same whoever else is in the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.methods.ipt.degrade import degrade, draw_streaks, resize
from pretrain.methods.ipt.tasks import SIX_TASKS, parse_task
from virtex_d2.engine.errors import InputError

CPU = torch.device("cpu")


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resized_along(image: np.ndarray, size: int) -> np.ndarray:
    """The first axis as MATLAB's imresize defines it: a matrix of weights, mirrored borders."""
    length = len(image)
    stretch = max(length / size, 1)
    matrix = np.zeros((size, length))
    for row in range(size):
        centre = (row + 0.5) * length / size - 0.5
        reach = range(math.floor(centre - 2 * stretch), math.ceil(centre + 2 * stretch) + 1)
        weights = cubic((np.array(reach) - centre) / stretch)
        for place, weight in zip(reach, weights / weights.sum()):
            mirrored = place % (2 * length)
            matrix[row, min(mirrored, 2 * length - 1 - mirrored)] += weight
    return np.tensordot(matrix, image, 1)


@pytest.mark.parametrize("factor", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
def test_resizing_is_that_of_matlab(factor):
    image = np.random.default_rng(0).uniform(0, 255, (36, 24))
    size = [round(side * factor) for side in image.shape]
    expected = resized_along(resized_along(image, size[0]).T, size[1]).T
    found = resize(torch.from_numpy(image)[None, None], factor)[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


def test_what_does_not_divide_is_not_resized():
    with pytest.raises(ValueError, match="13x12 pixels do not divide by 2"):
        resize(torch.zeros(1, 3, 12, 13), 1 / 2)


@given(st.sampled_from(SIX_TASKS), st.integers(0, 2**63 - 1))
def test_an_image_is_degraded_alike_alone_and_among_others(name, seed):
    task = parse_task(name)
    clean = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255
    together = degrade(clean, task, [1, seed, 2])
    (alone,) = degrade(clean[1:2], task, [seed])
    torch.testing.assert_close(together[1], alone, rtol=0, atol=1e-3)
    if task.sigma:
        assert torch.equal(together[1], alone)
    assert together.shape == (3, 3, 24 // task.scale, 24 // task.scale)
    assert together.min() >= 0
    assert together.max() <= 255


def test_small_images_have_whole_levels_and_noise_has_its_deviation():
    clean = torch.full((1, 3, 120, 120), 127.5) + torch.arange(120.0) / 8
    small = degrade(clean, parse_task("x3"), [0])
    assert torch.equal(small, small.round())
    noise = degrade(clean, parse_task("noise30"), [7]) - clean
    assert noise.std().item() == pytest.approx(30, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.5)
    assert not torch.equal(noise, noise.round())
    assert not torch.equal(noise, degrade(clean, parse_task("noise30"), [8]) - clean)


def test_rain_is_gray_whole_and_as_slanted_as_it_may_be():
    clean = torch.full((1, 3, 60, 60), 40.0)
    rain = degrade(clean, parse_task("derain"), [5]) - clean
    assert torch.equal(rain[:, :1].expand_as(rain), rain), "one layer for all colours"
    streaks = draw_streaks((160, 160), range(60), CPU)
    assert torch.equal(streaks, streaks.round())
    covered = (streaks > 20).float().mean((1, 2, 3))
    assert 0.005 < covered.mean() < 0.3
    assert covered.max() < 0.6
    slants = [slant_of(layer) for layer in streaks[:, 0].double()]
    assert max(map(abs, slants)) < 25 + 1
    assert min(slants) < -20, "to one side"
    assert max(slants) > 20, "and to the other"


def slant_of(layer: torch.Tensor) -> float:
    """Degrees from the vertical of what pixels are alike to, at distances up to eight."""
    spectrum = torch.fft.fft2(layer - layer.mean()).abs() ** 2
    alike = torch.fft.fftshift(torch.fft.ifft2(spectrum).real)[72:89, 72:89].clamp(min=0)
    reach = torch.arange(-8.0, 9, dtype=alike.dtype)
    alike[reach[:, None] ** 2 + reach**2 > 64] = 0
    yy, xx = (alike * reach[:, None] ** 2).sum(), (alike * reach**2).sum()
    xy = (alike * reach[:, None] * reach).sum()
    return math.degrees(0.5 * math.atan2(2 * xy, yy - xx))


def test_given_streaks_are_added():
    clean = torch.full((2, 3, 12, 12), 200.0)
    streaks = torch.zeros(2, 1, 12, 12)
    streaks[1, 0, 3:6, 4] = 100
    rainy = degrade(clean, parse_task("derain"), [0, 1], streaks)
    assert torch.equal(rainy[0], clean[0])
    assert (rainy[1, :, 3:6, 4] == 255).all()
    assert (rainy != 200).sum() == 9


@pytest.mark.parametrize("name", ["x5", "x1", "noise", "noise0", "noise256", "Noise30", "rain", ""])
def test_a_task_that_is_none_is_refused(name):
    with pytest.raises(InputError, match=f"'{name}' is no task: expected x2, x3, x4, derain"):
        parse_task(name)
