"""Images through tiles: the released code's results, seams, small images and memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.methods.ipt.tiles import STRIDES, count_tiles, restore_tiled, self_ensemble
from tests.ipt import cases
from virtex_d2.engine.errors import InputError

NO_NETWORK = {1: lambda tiles: tiles}  # by scale; each enlarges by copying pixels
for k in (2, 3, 4):
    NO_NETWORK[k] = lambda tiles, k=k: tiles.repeat_interleave(k, 2).repeat_interleave(k, 3)


def _restore(network, task):
    patch, scale = network.sizes.patch, network.sizes.scales[task]
    return lambda image: restore_tiled(
        lambda tiles: network(tiles, task), image, patch, scale, batch_size=7
    )


@pytest.mark.parametrize("name", cases.names("tiled"))
@torch.no_grad()
def test_tiles_are_put_together_as_by_the_released_code(name):
    case = cases.read_case(name)
    network = cases.network_of(case)
    for tiled in case["expected"]["tiled"]:
        image = cases.pixels(case, tiled["input"], tiled["seed"])
        found = _restore(network, tiled["task"])(image[0])[None]
        cases.assert_as(found, tiled["output"])
        row = found[0, 1, found.shape[2] // 2, :: max(1, found.shape[3] // 12)]
        size = tiled["output"]["norm"] / found.numel() ** 0.5
        np.testing.assert_allclose(row, tiled["row"], rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("name", cases.names("self_ensemble"))
@torch.no_grad()
def test_the_self_ensemble_is_that_of_the_released_code(name):
    case = cases.read_case(name)
    expected = case["expected"]["self_ensemble"]
    image = cases.pixels(case, expected["input"], expected["seed"])
    found = self_ensemble(_restore(cases.network_of(case), expected["task"]), image[0])
    cases.assert_as(found[None], expected["output"])


@given(
    st.integers(1, 61),
    st.integers(1, 61),
    st.sampled_from((12, 24)),
    st.sampled_from(sorted(NO_NETWORK)),
    st.sampled_from(STRIDES),
    st.integers(1, 9),
)
def test_tiles_that_agree_give_the_image_whatever_its_size(
    height, width, patch, scale, stride, batch_size
):
    image = torch.rand(3, height, width) * 255
    done = []
    found = restore_tiled(
        NO_NETWORK[scale], image, patch, scale, stride, batch_size, progress=done.append
    )
    expected = NO_NETWORK[scale](image[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert sum(done) == count_tiles(height, width, patch, stride)
    assert max(done) <= batch_size


def _borders(tiles):
    """What is wrong at the borders of a patch, as networks are."""
    damaged = tiles.clone()
    for border in (slice(0, 1), slice(-1, None)):
        damaged[:, :, border] = 999
        damaged[:, :, :, border] = 999
    return damaged


@pytest.mark.parametrize("stride", STRIDES)
def test_borders_of_tiles_are_seen_at_those_of_the_image_alone(stride):
    image = torch.full((3, 203, 150), 100.0)
    found = restore_tiled(_borders, image, 48, 1, stride)
    top = 12 if stride == 12 else 1  # where the released code takes the first tile alone
    assert (found[:, top:-1, 1:-1] - 100).abs().max() < 1e-3
    assert (found[:, 0] == 999).all()
    # the released code's own seam: where it stops doing so
    assert (found[0, 5, 47] == 999) == (stride == 12)


def test_a_stride_of_36_keeps_the_middle_of_each_tile():
    rows = torch.arange(84.0).expand(48, 84)  # one row of two tiles, which meet at column 42
    seen = restore_tiled(
        lambda tiles: tiles - tiles.amin((2, 3), keepdim=True), rows.expand(3, 48, 84), 48, 1, 36
    )
    assert seen[0, 0].tolist() == [*range(42), *range(6, 48)]
    assert count_tiles(48, 84, 48, 36) == 2
    assert count_tiles(48, 85, 48, 36) == 3


def test_the_released_rule_takes_sixteen_tiles_for_an_inner_pixel():
    large = 48 + 12 * 80
    assert count_tiles(large, large, 48, 12) == 81**2  # 12 x 12 pixels each
    assert count_tiles(768, 1024, 48, 12) == 61 * 83
    assert count_tiles(768, 1024, 48, 36) == 21 * 29


def test_a_small_image_is_continued_by_its_mirror_image():
    seen = []

    def look(tiles):
        seen.append(tiles)
        return tiles

    image = torch.arange(15.0).view(1, 3, 5).expand(3, 3, 5)
    assert torch.equal(restore_tiled(look, image, 12, 1), image)
    (tile,) = seen[0]
    assert tile.shape == (3, 12, 12)
    assert tile[0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
    assert tile[0, :, 0].tolist() == [0, 5, 10, 5] * 3


def test_patches_that_the_released_rule_cannot_cut_are_refused():
    with pytest.raises(InputError, match="cut in four, found patches of 18.*--stride 36"):
        restore_tiled(NO_NETWORK[1], torch.zeros(3, 40, 40), 18, 1)
    restored = restore_tiled(NO_NETWORK[1], torch.ones(3, 40, 40), 18, 1, 36)
    assert torch.equal(restored, torch.ones(3, 40, 40))
