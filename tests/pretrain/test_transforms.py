"""Crops, flips and colours of images, and what happens to their captions."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
import torchvision.transforms.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain import transforms as colors
from pretrain.jpeg import DecodedPicture, open_picture
from pretrain.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    EvalTransform,
    TrainTransform,
    draw_jitter,
    jitter_colors,
    normalize,
    swap_sides,
)
from virtex_d2.engine.images import read_image


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth colours, different in every corner."""
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    pixels = np.stack([40 + 200 * x, 30 + 180 * y, 220 - 120 * x - 80 * y], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def distance(a: object, b: object) -> float:
    """Mean absolute difference of two images, in levels of 0-255."""
    a, b = (np.asarray(image, np.float32) for image in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).mean())


def as_pil(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).numpy())


def train(transform: TrainTransform, image: Image.Image, caption: str = "", seed: int = 0) -> tuple:
    """Pixels, caption and jitter."""
    return transform(DecodedPicture(image), caption, np.random.default_rng(seed))


@pytest.fixture(scope="session")
def photographs(real_data) -> list[Path]:
    return sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:40]


# Captions


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a dog left of a cat", "a dog right of a cat"),
        ("Left, right and LEFT.", "Right, left and RIGHT."),
        ("bright leftover upright lefty", "bright leftover upright lefty"),
        ("a left-handed man's right", "a right-handed man's left"),
    ],
)
def test_whole_words_change_sides_and_keep_their_case(caption, swapped):
    """Guards against the released code's "bright" -> "bleft"."""
    assert swap_sides(caption) == swapped
    assert swap_sides(swapped) == caption


WORDS = st.sampled_from(
    ["left", "right", "Left", "RIGHT", "bright", "leftover", ".", ",", "-", "'", "é", "左", "man"]
)


@given(st.lists(st.tuples(WORDS, st.sampled_from(["", " ", "  "]))))
def test_sides_swap_word_by_word_and_swapping_twice_changes_nothing(parts):
    caption = "".join(word + space for word, space in parts)
    swapped = swap_sides(caption)
    assert swap_sides(swapped) == caption
    other = {"left": "right", "right": "left"}
    expected = [other.get(word, word) for word in re.findall(r"\w+", caption.lower())]
    assert re.findall(r"\w+", swapped.lower()) == expected


@given(st.text())
def test_captions_without_sides_stay_as_they_are(caption):
    if not {"left", "right"} & set(re.findall(r"\w+", caption.lower())):
        assert swap_sides(caption) == caption


# Crops


SIDES = st.integers(1, 700)


@settings(max_examples=200)
@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**32))
def test_crops_lie_in_the_image_whatever_its_size(width, height, seed):
    transform = TrainTransform(8)
    x0, y0, x1, y1 = transform._crop_box((width, height), np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


def test_crops_have_the_area_and_the_ratio_asked_for_everywhere_in_the_image():
    transform = TrainTransform(8)
    rng = np.random.default_rng(0)
    boxes = np.array([transform._crop_box((640, 480), rng) for _ in range(2000)])
    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(axis=1) / (640 * 480)
    ratio = size[:, 0] / size[:, 1]
    assert 0.199 < area.min() < 0.21
    assert 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.35
    assert (boxes[:, :2].min(axis=0) == 0).all()
    assert (boxes[:, 2:].max(axis=0) == (640, 480)).all()

    torch.manual_seed(0)
    image = Image.new("L", (640, 480))
    theirs = np.array(
        [tv.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
    )
    assert abs(area.mean() - theirs[:, 2:].prod(axis=1).mean() / (640 * 480)) < 0.02
    assert abs(boxes[:, 0].mean() - theirs[:, 1].mean()) < 10


def test_an_image_too_narrow_for_any_crop_gives_its_centre():
    transform = TrainTransform(8, scale=(1.0, 1.0))
    assert transform._crop_box((1000, 90), np.random.default_rng(0)) == (440, 0, 560, 90)
    assert transform._crop_box((90, 1000), np.random.default_rng(0)) == (0, 440, 90, 560)


def test_a_reduced_jpeg_is_never_enlarged_again():
    transform = TrainTransform(100)
    side = transform.smallest_side
    rng = np.random.default_rng(0)
    for _ in range(500):
        x0, y0, x1, y1 = transform._crop_box((side, side), rng)
        assert min(x1 - x0, y1 - y0) >= 99  # rounding


# Transforms


@pytest.mark.parametrize("size", [(30_000, 16), (16, 30_000), (1, 1), (1, 500)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_of_extreme_sizes_are_read(tmp_path, size, suffix):
    path = str(tmp_path / f"extreme.{suffix}")
    Image.new("RGB", size, (200, 100, 50)).save(path)
    transform = TrainTransform(32)
    picture = open_picture(path, transform.smallest_side)
    assert transform(picture, "", np.random.default_rng(0))[0].shape == (3, 32, 32)
    transform = EvalTransform(32)
    assert transform(read_image(path, transform.smallest_side), "")[0].shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (97, 61)])
def test_every_image_becomes_a_square_of_bytes(size):
    for pixels, caption in (
        train(TrainTransform(32), scene(*size), "a cat")[:2],
        EvalTransform(32)(scene(*size), "a cat"),
    ):
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == torch.uint8
        assert pixels.permute(1, 2, 0).is_contiguous()
        assert caption == "a cat"


def test_a_flip_mirrors_the_image_and_swaps_the_sides():
    straight, caption, _ = train(TrainTransform(32, flip=0.0), scene(), "on the left", 5)
    mirrored, other, _ = train(TrainTransform(32, flip=1.0), scene(), "on the left", 5)
    assert torch.equal(mirrored, straight.flip(-1))
    assert not torch.equal(mirrored, straight)
    assert (caption, other) == ("on the left", "on the right")


def test_images_and_captions_flip_together_half_of_the_time():
    transform = TrainTransform(16, scale=(0.9, 1.0))
    flips = 0
    for seed in range(400):
        pixels, caption, _ = train(transform, scene(), "left", seed)
        mirrored = bool(pixels[0, :, 0].float().mean() > pixels[0, :, -1].float().mean())
        assert mirrored == (caption == "right")
        flips += mirrored
    assert 160 < flips < 240


def test_a_transform_is_a_function_of_the_generator():
    transform = TrainTransform(32)
    first, again, other = (train(transform, scene(), seed=seed) for seed in (1, 1, 2))
    for part in (0, 2):
        assert torch.equal(first[part], again[part])
        assert not torch.equal(first[part], other[part])


def test_a_crop_is_what_torchvision_makes_of_the_box(photographs):
    """Pillow's antialiased bilinear filter, up to rounding."""
    for seed, path in enumerate(photographs[:10]):
        image = read_image(str(path))
        transform = TrainTransform(112, flip=0)
        box = transform._crop_box(image.size, np.random.default_rng(seed))
        theirs = image.crop(box).resize((112, 112), Image.Resampling.BILINEAR)
        assert distance(as_pil(train(transform, image, "", seed)[0]), theirs) < 0.6


def test_evaluation_sees_what_torchvisions_resize_and_centre_crop_sees(photographs):
    theirs = tv.Compose([tv.Resize(112), tv.CenterCrop(112)])
    for path in photographs[:10]:
        image = read_image(str(path))
        ours, _ = EvalTransform(112)(image, "")
        # they round the crop to whole pixels after resizing, we before: compare neighbourhoods
        assert distance(as_pil(ours).resize((28, 28)), theirs(image).resize((28, 28))) < 4
        assert torch.equal(ours, EvalTransform(112)(image, "")[0])


def test_augmented_photographs_keep_their_colours_and_vary(photographs):
    transform = TrainTransform(112)
    changes = []
    for seed, path in enumerate(photographs):
        picture = open_picture(str(path), transform.smallest_side)
        pixels, _, jitter = transform(picture, "", np.random.default_rng(seed))
        assert pixels.float().std() > 5
        shown = normalize(pixels[None], jitter[None]).mean(dim=(2, 3)) * 57.6 + 117.8
        changes.append(float(shown.mean()) - np.asarray(read_image(str(path))).mean())
    assert abs(np.mean(changes)) < 12  # jitter lightens as often as it darkens
    assert np.std(changes) > 10


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
