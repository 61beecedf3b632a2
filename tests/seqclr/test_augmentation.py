"""Views of words: each change has its distribution, and does what it says to the pixels."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, gaussian_filter

from pretrain.config import load_pretrain_config
from pretrain.methods.seqclr.augmentation import (
    CHANGES,
    NUMBERS,
    PART,
    ViewDraws,
    augment,
    no_change,
    source_grid,
)

H, W = 32, 100
VIEWS = 4000


def draws_of(number: tuple[int, int] | None = None, style: bool = False, **ranges) -> ViewDraws:
    own = load_pretrain_config(None, ["MODEL.OBJECTIVE", "seqclr"]).SEQCLR
    own.STYLE = style
    own.AUGMENT.NUMBER = number or own.AUGMENT.NUMBER
    for name, value in ranges.items():
        own.AUGMENT[name] = value
    return ViewDraws(own)


def view(**parts) -> torch.Tensor:
    """Numbers of one view (1, NUMBERS)."""
    numbers = no_change()
    for name, value in parts.items():
        numbers[PART[name]] = value
    return torch.from_numpy(numbers)[None]


def image(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, H, W), np.uint8))


def made(draws: torch.Tensor, pixels: torch.Tensor | None = None, noise=None) -> torch.Tensor:
    return augment(image() if pixels is None else pixels, draws, noise, draws_of().radius)


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    draw, rng = draws_of(), np.random.default_rng(0)
    return np.stack([draw(rng).numpy() for _ in range(VIEWS)])


def test_a_view_gets_one_to_five_of_the_seven_changes_each_as_often(many):
    changed = {
        "CONTRAST": many[:, PART["contrast"]] != 1,
        "BLUR": many[:, PART["blur"]] != 0,
        "CROP_VERTICAL": many[:, PART["crop"]][:, :2] != 0,
        "CROP_HORIZONTAL": many[:, PART["crop"]][:, 2:] != 0,
        **{name: many[:, PART[name.lower()]] != 0 for name in ("SHARPEN", "WARP", "PERSPECTIVE")},
    }
    assert changed.keys() == set(CHANGES)
    changed = np.stack([changed[name].any(1) for name in CHANGES], 1)
    counts = np.bincount(changed.sum(1), minlength=8) / VIEWS
    np.testing.assert_allclose(counts, [0, *[0.2] * 5, 0, 0], atol=0.03)
    np.testing.assert_allclose(changed.mean(0), 3 / 7, atol=0.03)  # a mean of three of seven


@pytest.mark.parametrize(
    ("part", "low", "high", "least"),
    [
        ("contrast", 0.5, 1, 1),
        ("blur", 0.5, 1.5, 0),
        ("sharpen", 0, 0.5, 0),
    ],
)
def test_a_number_is_uniform_in_its_range(many, part, low, high, least):
    check_uniform(many[:, PART[part]], low, high, nothing=least)


def check_uniform(values: np.ndarray, low: float, high: float, nothing: float = 0) -> None:
    values = values[values != nothing]
    assert values.min() >= low
    assert values.max() <= high
    quantiles = np.quantile(values, [0.1, 0.5, 0.9])
    expected = low + (high - low) * np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(quantiles, expected, atol=0.05 * (high - low))


def test_crops_are_uniform_and_along_the_text_hardly_any(many):
    crop = many[:, PART["crop"]]
    check_uniform(crop[:, 0], 0, 0.4)
    check_uniform(crop[:, 1], 0, 0.4)
    check_uniform(crop[:, 2:], 0, 0.02)
    cut = crop[(crop[:, :2] != 0).all(1)]
    assert abs(np.corrcoef(cut[:, 0], cut[:, 1])[0, 1]) < 0.1, "top and bottom are independent"


def test_shifts_are_normal_with_a_deviation_of_their_own_per_view(many):
    warp = many[:, PART["warp"]]
    warp = warp[(warp != 0).any(1)]
    of_view = warp.std(1)
    # a deviation that is uniform in 0.02 to 0.03, estimated from 32 numbers
    assert 0.024 < of_view.mean() < 0.026
    assert abs(warp.mean()) < 1e-3
    inwards = many[:, PART["perspective"]]
    inwards = inwards[(inwards != 0).any(1)]
    assert inwards.min() >= 0, "corners move inwards"
    # the mean of abs(normal) is sqrt(2 / pi) deviations
    np.testing.assert_allclose(inwards.mean(), 0.015 * np.sqrt(2 / np.pi), rtol=0.05)


def test_style_inverts_half_of_the_views_and_is_off_where_it_is_not_asked_for(many):
    assert (many[:, PART["gain"]] == 1).all()
    assert (many[:, PART["noise"]] == 0).all()
    draw, rng = draws_of(style=True), np.random.default_rng(0)
    styled = np.stack([draw(rng).numpy() for _ in range(VIEWS)])
    gain = styled[:, PART["gain"]]
    np.testing.assert_allclose((gain < 0).mean(), 0.5, atol=0.03)
    check_uniform(abs(gain), 0.5, 1.5)
    check_uniform(styled[:, PART["offset"]], -64, 64)
    check_uniform(styled[:, PART["noise"]], 0, 12)
    noise = draw.noise(rng, H, W)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.05


def test_no_change_is_the_image():
    assert view().shape == (1, NUMBERS)
    torch.testing.assert_close(made(view()), image().float(), atol=0.02, rtol=0)


def test_no_view_turns_or_mirrors_a_word():
    draw, rng = draws_of((7, 7)), np.random.default_rng(0)
    grid = source_grid(torch.stack([draw(rng) for _ in range(300)]), H, W)
    x, y = grid.unbind(3)
    assert (x[:, :, 8:] > x[:, :, :-8]).all(), "what is to the right stays there"
    assert (y[:, 12:] > y[:, :-12]).all(), "what is below stays there"
    # along the text a shift is a small part of the width, which is 2 here
    straight = torch.linspace(-1, 1, W).expand(H, W)
    assert (x - straight).abs().max() < 0.35


def test_a_crop_takes_a_part_back_to_size():
    ramp = torch.arange(H, dtype=torch.float32)[:, None].expand(1, 3, H, W) * 4
    found = made(view(crop=[0.25, 0.25, 0, 0]), ramp)[0, 0, :, 50]
    # row r of the view is at 8 + (r + 0.5) / 2 - 0.5 of the image
    expected = (8 + (torch.arange(H) + 0.5) / 2 - 0.5) * 4
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_a_perspective_takes_the_views_corners_to_where_they_moved():
    shifts = np.array([[0.02, 0.04], [0.01, 0.03], [0.05, 0.0], [0.03, 0.02]])
    grid = source_grid(view(perspective=shifts.flatten()), 400, 400)[0].numpy()
    unit = (grid + 1) / 2
    corners = np.array([unit[0, 0], unit[0, -1], unit[-1, -1], unit[-1, 0]])
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    expected = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) + signs * shifts
    np.testing.assert_allclose(corners, expected, atol=0.003)  # pixels' centres, not edges
    along = unit[7]  # straight lines stay straight
    direction = along[-1] - along[0]
    across = (along - along[0]) @ np.array([-direction[1], direction[0]])
    assert abs(across).max() < 1e-5


def test_a_warp_moves_its_points_and_what_lies_between_in_proportion():
    points = np.zeros((2, 4, 4), np.float32)
    points[0, 0, 1], points[1, 3, 2] = 0.05, -0.04
    moved = source_grid(view(warp=points.flatten()), 31, 31)[0] / 2
    still = source_grid(view(), 31, 31)[0] / 2
    shift = (moved - still).numpy()
    np.testing.assert_allclose(shift[0, 10], [0.05, 0], atol=1e-6)
    np.testing.assert_allclose(shift[30, 20], [0, -0.04], atol=1e-6)
    np.testing.assert_allclose(shift[5, 10], [0.025, 0], atol=1e-6)
    assert abs(shift[15]).max() < 1e-6


def test_contrast_blur_and_sharpening_are_what_they_are_elsewhere():
    pixels = image()[0].numpy().astype(np.float64)
    faint = made(view(contrast=0.5))[0].numpy()
    np.testing.assert_allclose(faint, 127 + 0.5 * (pixels - 127), atol=0.02)

    soft = made(view(blur=1.2))[0].numpy()
    expected = gaussian_filter(pixels, (0, 1.2, 1.2), mode="nearest", radius=(0, 5, 5))
    np.testing.assert_allclose(soft, expected, atol=0.05)

    share, lightness = 0.3, 0.4
    kernel = -np.ones((3, 3)) * share
    kernel[1, 1] = (1 - share) + share * (8 + lightness)
    expected = [convolve(plane, kernel, mode="nearest").clip(0, 255) for plane in pixels]
    sharp = made(view(sharpen=[share, lightness]))[0].numpy()
    np.testing.assert_allclose(sharp, expected, atol=0.1)


def test_style_changes_levels_and_clips_nothing():
    noise = torch.randn(1, H, W, generator=torch.Generator().manual_seed(0))
    found = made(view(gain=-1.5, offset=[10, 20, 30], noise=5), noise=noise)
    offset = torch.tensor([10.0, 20, 30])[:, None, None]
    expected = 127 - 1.5 * (image().float() - 127) + offset + 5 * noise
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert found.min() < 0
    assert found.max() > 255


def test_a_view_does_not_depend_on_those_beside_it():
    draw, rng = draws_of(style=True), np.random.default_rng(3)
    draws = torch.stack([draw(rng) for _ in range(5)])
    noise = torch.stack([draw.noise(rng, H, W) for _ in range(5)])
    pixels = torch.cat([image(seed) for seed in range(5)])
    together = augment(pixels, draws, noise, draw.radius)
    alone = augment(pixels[3:4], draws[3:4], noise[3:4], draw.radius)
    torch.testing.assert_close(together[3:4], alone, atol=1e-3, rtol=0)
