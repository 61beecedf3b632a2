"""Crops of JPEGs: those of the whole file, bit for bit, by decoding little of it."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pretrain.jpeg import DecodedPicture, Jpeg, NotPlainError, open_picture
from virtex_d2.engine.images import read_image

ALL = 10**6  # a side that no crop has, so that none is reduced


def noisy(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours and noise: neighbouring blocks differ."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    pixels = np.stack([200 * x, 180 * y, 220 - 120 * x - 80 * y], -1)
    pixels = pixels + rng.integers(0, 50, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def whole(data: bytes) -> np.ndarray:
    return np.asarray(read_image(io.BytesIO(data)))


def bytes_decoded(data: bytes, box: tuple) -> int:
    return len(Jpeg(data)._part(box).data)


KINDS = {
    "plain": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "a marker after each block": {"restart_marker_blocks": 1},
    "after each row": {"restart_marker_rows": 1},
    "after half of a row": {"restart_marker_blocks": 3},  # of six MCUs, where there are six
    "after seven blocks, which tile nothing": {"restart_marker_blocks": 7},
    "full colours": {"subsampling": 0, "restart_marker_blocks": 1},
    "colours of half the width": {"subsampling": 1, "restart_marker_blocks": 1},
    "progressive with markers": {"progressive": True, "restart_marker_blocks": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_crop_has_the_pixels_of_the_whole_image(kind, mode, data):
    width, height = data.draw(st.sampled_from([(96, 70), (93, 81), (16, 16), (1, 5), (161, 9)]))
    options = {k: v for k, v in KINDS[kind].items() if mode == "RGB" or k != "subsampling"}
    file = jpeg(noisy(width, height, mode), **options)
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    decoded = Jpeg(file)
    assert decoded.size == (width, height)
    crop = decoded.pixels((x0, y0, x1, y1), ALL)
    assert np.array_equal(crop, whole(file)[y0:y1, x0:x1])


def test_photographs_have_their_pixels_too(real_data):
    rng = np.random.default_rng(0)
    for path in sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:20]:
        original = path.read_bytes()
        marked = jpeg(Image.open(path).convert("RGB"), restart_marker_blocks=1)
        for file in (original, marked):
            width, height = Jpeg(file).size
            x0, y0 = int(rng.integers(width - 50)), int(rng.integers(height - 50))
            crop = Jpeg(file).pixels((x0, y0, x0 + 50, y0 + 50), ALL)
            assert np.array_equal(crop, whole(file)[y0 : y0 + 50, x0 : x0 + 50])


def test_between_restart_markers_only_what_the_crop_needs_is_decoded():
    image = noisy(640, 480)
    box = (200, 100, 440, 340)  # 19 % of the area
    plain, rows, blocks = (
        jpeg(image, **options)
        for options in ({}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 1})
    )
    assert bytes_decoded(plain, box) == len(plain)
    assert bytes_decoded(rows, box) < 0.6 * len(rows)
    assert bytes_decoded(blocks, box) < 0.26 * len(blocks)


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize(
    ("side", "reduction"), [(300, 1), (161, 1), (160, 2), (81, 2), (80, 4), (40, 8), (5, 8)]
)
def test_large_crops_are_decoded_at_a_reduced_size_that_is_large_enough(options, side, reduction):
    image = noisy(480, 400)
    box = (33, 47, 33 + 340, 47 + 320)
    crop = Jpeg(jpeg(image, quality=95, **options)).pixels(box, side)
    assert abs(crop.shape[0] - 320 / reduction) <= 1
    assert abs(crop.shape[1] - 340 / reduction) <= 1
    smooth = image.crop(box).resize(crop.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(crop - np.asarray(smooth, np.float32)).mean() < 12


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_reduced_crop_keeps_the_side_and_is_the_whole_images(kind, data):
    width, height = data.draw(st.sampled_from([(96, 130), (93, 81), (200, 200)]))
    image = noisy(width, height)
    file = jpeg(image, **KINDS[kind])
    x0, y0 = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    side = data.draw(st.integers(1, min(x1 - x0, y1 - y0)))
    crop = Jpeg(file).pixels((x0, y0, x1, y1), side).copy()
    assert min(crop.shape[:2]) >= side
    reduction = next((r for r in (8, 4, 2) if min(x1 - x0, y1 - y0) >= r * max(side, 8)), 1)
    reduced = simplejpeg.decode_jpeg(
        file,
        min_width=-(-width // reduction),
        min_height=-(-height // reduction),
        min_factor=reduction,
        strict=False,
    )
    half = reduction // 2
    rows, columns = (
        slice((first + half) // reduction, (end + half) // reduction)
        for first, end in ((y0, y1), (x0, x1))
    )
    assert np.array_equal(crop, reduced[rows, columns])


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (479, 399, 480, 400), (0, 399, 480, 400)])
def test_reduced_crops_are_never_empty(options, box):
    file = jpeg(noisy(480, 400), **options)
    for side in (1, 0):
        assert min(Jpeg(file).pixels(box, side).shape[:2]) >= 1


def test_images_decoded_one_after_the_other_have_their_own_pixels():
    """Memory is used again: larger, smaller and larger images, and one too large to be kept."""
    for size in [(64, 48), (640, 480), (16, 16), (2100, 2000), (640, 480)]:
        file = jpeg(noisy(*size))
        assert np.array_equal(Jpeg(file).pixels((0, 0, *size), ALL), whole(file))


def test_rows_below_the_crop_are_not_decoded():
    image = noisy(640, 480)
    for options, height in (({}, 208), ({"progressive": True}, 480)):
        part = Jpeg(jpeg(image, **options))._part((200, 100, 440, 200))
        assert (part.left, part.top, part.width, part.height) == (0, 0, 640, height)


# What is left to Pillow


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "camera"
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "file",
    [
        jpeg(noisy(60, 40), exif=exif_of(6)),
        jpeg(noisy(60, 40), xmp=XMP),
        jpeg(noisy(60, 40), exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"),
        jpeg(noisy(60, 40, "CMYK")),
    ],
    ids=["turned", "turned by XMP", "odd EXIF", "CMYK"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_is_no_plain_jpeg_becomes_what_pillow_makes_of_it(file):
    expected = read_image(io.BytesIO(file))
    picture = open_picture(io.BytesIO(file), 0)
    assert picture.size == expected.size
    box = (2, 3, 30, 35)
    assert np.array_equal(picture.crop(box, 16), DecodedPicture(expected).crop(box, 16))


@pytest.mark.parametrize("file", [b"", b"\xff\xd8", b"text", jpeg(noisy(60, 40))[:100]])
def test_what_cannot_be_opened_is_refused_in_pillows_words(file):
    messages = []
    for read in (read_image, lambda stream: open_picture(stream, 0)):
        with pytest.raises(OSError) as caught:
            read(io.BytesIO(file))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_upright_photograph_with_exif_is_a_plain_jpeg():
    assert isinstance(open_picture(io.BytesIO(jpeg(noisy(60, 40), exif=exif_of(1))), 0), Jpeg)


def test_a_jpeg_of_too_many_pixels_is_left_to_pillow(monkeypatch):
    file = jpeg(noisy(60, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(NotPlainError, match="too many"):
        Jpeg(file)


def test_a_picture_that_is_cut_short_is_refused_in_pillows_words(tmp_path):
    for options in ({}, {"restart_marker_blocks": 1}, {"progressive": True}):
        file = jpeg(noisy(200, 160), **options)
        path = tmp_path / "cut.jpg"
        path.write_bytes(file[: len(file) // 2])
        with pytest.raises(OSError, match="truncated"):
            open_picture(str(path), 0).crop((0, 0, 8, 8), 8)
    with pytest.raises(FileNotFoundError):
        open_picture(str(tmp_path / "none.jpg"), 0)


SEEDS = [jpeg(noisy(90, 70)), jpeg(noisy(90, 70), restart_marker_blocks=1)]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300)
@given(
    kind=st.sampled_from([0, 1]),
    changes=st.lists(
        st.tuples(st.integers(0, 700) | st.integers(0, 10_000), st.integers(0, 255)), max_size=6
    ),
    length=st.none() | st.integers(0, 10_000),
)
@example(kind=1, changes=[(0, 255)], length=None)
def test_damaged_bytes_give_a_crop_or_an_os_error(kind, changes, length):
    damaged = bytearray(SEEDS[kind])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with contextlib.suppress(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = open_picture(io.BytesIO(bytes(damaged[:length])), 8)
        width, height = picture.size
        box = (width // 3, height // 3, width // 3 + 1 + width // 2, height // 3 + 1 + height // 2)
        box = (*box[:2], min(box[2], width), min(box[3], height))
        assert picture.crop(box, 16).shape == (16, 16, 3)


@settings(max_examples=100)
@given(kind=st.sampled_from([0, 1]), place=st.floats(0.3, 0.99), value=st.integers(1, 255))
@example(kind=0, place=0.5, value=181)  # a marker in the middle, where the image seems to end
def test_damage_costs_the_image_where_it_does_with_pillow_and_nowhere_else(kind, place, value):
    """libjpeg's warnings are none of its errors. Only what lies beside a crop may be overlooked."""
    file = bytearray(SEEDS[kind])
    file[int(place * len(file))] ^= value
    box = (10, 20, 71, 52)
    found = expected = None
    with contextlib.suppress(OSError):
        expected = DecodedPicture(read_image(io.BytesIO(bytes(file)))).crop(box, 16)
    with contextlib.suppress(OSError):
        found = open_picture(io.BytesIO(bytes(file)), 0).crop(box, 16)
    if expected is None:
        undamaged = Jpeg(SEEDS[kind]).crop(box, 16)
        assert found is None or np.array_equal(found, undamaged)
    else:
        assert found is not None
