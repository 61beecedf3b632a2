"""Jitter and normalisation of batches: torchvision's, and of each image for itself."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import colors
from pretrain.colors import PIXEL_MEAN, PIXEL_STD, draw_jitter, jitter_colors, normalize

RECIPE = (0.4, 0.4, 0.4, 0.1)
ADJUST = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)


def images(count: int, side: int = 33, seed: int = 0) -> torch.Tensor:
    """Noise, smooth colours, greys, black and white: what hue and contrast may stumble over."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    pixels[..., : side // 4, :] = pixels[:, :1, : side // 4]
    pixels[..., -2, :], pixels[..., -1, :] = 0, 255
    pixels[..., :, -8:] = pixels[..., :1, -8:] // 3 * torch.tensor([3, 1, 2]).view(3, 1, 1)
    return pixels


def drawn(count: int, amounts=RECIPE, probability: float = 0.8) -> torch.Tensor:
    return torch.stack(
        [draw_jitter(amounts, probability, np.random.default_rng(seed)) for seed in range(count)]
    )


def torchvisions(image: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    for kind, factor in steps.tolist():
        if kind >= 0:
            image = ADJUST[int(kind)](image, factor)
    return image


def test_jitter_is_torchvisions_on_floats_to_a_hundredth_of_a_level():
    pixels, jitter = images(48), drawn(48)
    ours = pixels.float()
    jitter_colors(ours, jitter)
    for image, steps, result in zip(pixels, jitter, ours):
        theirs = torchvisions(image.float() / 255, steps) * 255
        assert (result - theirs).abs().max() < 0.01


def test_jitter_is_torchvisions_on_bytes_but_for_their_rounding_after_each_change():
    pixels, jitter = images(48), drawn(48)
    ours = pixels.float()
    jitter_colors(ours, jitter)
    for image, steps, result in zip(pixels, jitter, ours):
        assert (result - torchvisions(image, steps)).abs().mean() < 2.5


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("factor", [-0.5, -0.1, 0.0, 0.3, 0.5, 1.0, 1.4, 2.0])
def test_each_change_alone_is_torchvisions(kind, factor):
    if abs(factor) > 0.5 if kind == colors.HUE else factor < 0:
        return  # torchvision refuses them
    pixels = images(2)
    ours = pixels.float()
    jitter_colors(ours, torch.tensor([[[kind, factor]]] * 2))
    assert (ours - ADJUST[kind](pixels / 255, factor) * 255).abs().max() < 0.01
    if factor == (0.0 if kind == colors.HUE else 1.0):
        assert (ours - pixels).abs().max() < 0.01


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=8), at_a_time=st.integers(1, 9))
def test_an_image_is_changed_in_the_same_way_whatever_else_is_in_its_batch(cuts, at_a_time):
    """To the bit: processes and resumed runs put other batches together."""
    count = sum(cuts)
    pixels, jitter = images(count), drawn(count)
    before = dict(colors._AT_A_TIME)
    whole = normalize(pixels, jitter)
    try:
        colors._AT_A_TIME["cpu"] = at_a_time
        parts = [normalize(p, j) for p, j in zip(pixels.split(cuts), jitter.split(cuts))]
    finally:
        colors._AT_A_TIME.update(before)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    pixels, jitter = images(3, side=224), drawn(3, probability=1)
    before = torch.get_num_threads()
    alone = normalize(pixels, jitter)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(normalize(pixels, jitter), alone)
    finally:
        torch.set_num_threads(before)


def test_memory_formats_change_where_the_numbers_lie_and_nothing_else():
    pixels, jitter = images(5), drawn(5)
    plain = normalize(pixels, jitter)
    last = normalize(
        pixels.contiguous(memory_format=torch.channels_last), jitter, torch.channels_last
    )
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_the_bytes_of_a_batch_stay_as_they_are():
    pixels = images(4)
    before = pixels.clone()
    normalize(pixels, drawn(4))
    assert torch.equal(pixels, before)


def test_normalisation_is_imagenets_on_float32():
    pixels = images(2)
    ours = normalize(pixels)
    theirs = tvf.normalize(pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert PIXEL_MEAN == (123.675, 116.28, 103.53)
    assert PIXEL_STD == (58.395, 57.12, 57.375)
    assert normalize(pixels[:0]).shape == (0, 3, 33, 33)


def test_no_jitter_gives_the_plain_colours():
    pixels = images(3)
    assert torch.equal(normalize(pixels, drawn(3, probability=0.0)), normalize(pixels))
    assert torch.equal(normalize(pixels, drawn(3, amounts=(0, 0, 0, 0))), normalize(pixels))


def test_changes_come_in_every_order_within_their_ranges_as_often_as_asked():
    jitter = drawn(2000)
    changed = jitter[:, 0, 0] >= 0
    assert 0.77 < changed.float().mean() < 0.83
    assert (jitter[~changed, :, 0] == -1).all()
    kinds, factors = jitter[changed, :, 0], jitter[changed, :, 1]
    assert len({tuple(row) for row in kinds.tolist()}) == 24
    for kind, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        found = factors[kinds == kind]
        assert len(found) == changed.sum()
        assert low <= found.min() < low + 0.01 * (high - low)
        assert high >= found.max() > high - 0.01 * (high - low)
        assert abs(found.mean() - (low + high) / 2) < 0.02 * (high - low)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_changes_colours_as_a_cpu_does():
    pixels, jitter = images(32, side=64), drawn(32)
    there = normalize(pixels.cuda(), jitter)
    assert there.is_cuda
    assert (there.cpu() - normalize(pixels, jitter)).abs().max() < 1e-4
    assert torch.equal(
        torch.cat([normalize(p, j) for p, j in zip(pixels.cuda().split(5), jitter.split(5))]), there
    )
