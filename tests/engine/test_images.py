"""Decoding of images: every format, damaged files, EXIF."""

import contextlib
import io
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import files_in, image_suffix, images_in, read_image


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright_as_their_exif_says(tmp_path, orientation, suffix):
    upright = scene()
    # what a camera would store: the turn whose undoing is asked for
    stored = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif, quality=95)
    assert distance(read_image(str(path)), upright) < 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_pixel_format_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    grey = scene().convert("L").convert("RGB")
    if mode == "I;16":
        Image.fromarray(np.asarray(grey.convert("L"), np.uint16) * 257).save(path)
    else:
        grey.convert(mode).save(path, **({"quality": 95} if mode == "CMYK" else {}))
    image = read_image(str(path))
    assert image.mode == "RGB"
    assert image.size == grey.size
    # dithering to black and white and a palette keep the level of a neighbourhood, not of a pixel
    assert distance(image.resize((6, 4)), grey.resize((6, 4))) < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    path = tmp_path / "image.jpg"
    scene().save(path, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert read_image(str(path)).size == scene().size


def test_a_missing_an_empty_and_a_truncated_file_raise_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(str(tmp_path / "none.jpg"))
    whole, path = jpeg_bytes(), tmp_path / "cut.jpg"
    for length in (0, 2, 20, 300, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError):
            read_image(str(path))


def jpeg_bytes() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "abc"
    stream = io.BytesIO()
    scene().save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@settings(max_examples=300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 200) | st.integers(0, 5000), st.integers(0, 255)), max_size=8
    ),
    length=st.none() | st.integers(0, 5000),
)
def test_damaged_bytes_give_an_image_or_an_os_error(tmp_path_factory, changes, length):
    """Guards against Pillow's TypeError on a damaged EXIF, which would stop a run."""
    damaged = bytearray(jpeg_bytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(damaged[:length])
    mode = "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged headers
        with contextlib.suppress(OSError):
            mode = read_image(str(path), 8).mode
    assert mode == "RGB"


def test_large_jpegs_are_decoded_small_but_never_below_the_side_asked_for(tmp_path):
    path = tmp_path / "large.jpg"
    scene(1600, 1200).save(path)
    assert read_image(str(path), 300).size == (400, 300)
    assert read_image(str(path), 301).size == (800, 600)
    assert read_image(str(path)).size == (1600, 1200)


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 9_500), (60_000, 3_000)])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"pixels"):
        read_image(io.BytesIO(png_of(*size)))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 50_000


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_is_read_up_to_the_size_that_pillow_refuses(tmp_path, monkeypatch):
    """Pillow warns of half as many pixels already, and orthophotos have them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", scene().width * scene().height - 1)
    path = tmp_path / "large.png"
    scene().save(path)
    assert distance(read_image(str(path)), scene()) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", scene().width * scene().height // 2 - 1)
    with pytest.raises(OSError, match="DecompressionBombError: Image size"):
        read_image(str(path))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path, transparency):
    path = tmp_path / "palette.png"
    image = Image.new("P", (9, 9), 1)
    image.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 255])
    image.save(path, transparency=transparency)
    assert read_image(str(path)).getpixel((4, 4)) == (0, 200, 0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(path), "n_frames", 1) == 3
    assert distance(read_image(str(path)), frames[0]) < 2


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def grey_file(folder, levels, suffix="tif"):
    """Grey of more than 8 bits: uint16, int32 or float32."""
    path = str(folder / f"deep.{suffix}")
    Image.fromarray(levels).save(path)
    return path


def twelve_bits(folder):
    """A TIFF of 12 bits a level, which Pillow reads and does not write."""
    levels = (RAMP.ravel() * 16 + 15).astype(np.uint32)
    packed = bytearray()
    for first, second in levels.reshape(-1, 2):
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16)]
    tags += [(279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    path = folder / "twelve.tif"
    path.write_bytes(header + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    return str(path)


DEEP = {
    "16-bit PNG": lambda folder: grey_file(folder, RAMP * 257, "png"),
    "16-bit TIFF": lambda folder: grey_file(folder, RAMP * 257),
    "12-bit TIFF": twelve_bits,
    "16-bit PGM": lambda folder: grey_file(folder, RAMP * 257, "ppm"),
    "32-bit TIFF, 8 bits in use": lambda folder: grey_file(folder, RAMP.astype(np.int32)),
    "32-bit TIFF, 16 in use": lambda folder: grey_file(folder, RAMP.astype(np.int32) * 257),
    "32-bit TIFF, all in use": lambda folder: grey_file(folder, RAMP.astype(np.int32) << 23),
    "float TIFF to 1": lambda folder: grey_file(folder, RAMP.astype(np.float32) / 255),
    "float TIFF to 255": lambda folder: grey_file(folder, RAMP.astype(np.float32)),
    "float TIFF to 65535": lambda folder: grey_file(folder, RAMP.astype(np.float32) * 257),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_more_than_eight_bits_is_scaled_and_not_clipped(kind, tmp_path):
    found = np.asarray(read_image(DEEP[kind](tmp_path)))[..., 0]
    assert np.abs(found.astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        (np.full((4, 4), np.nan, np.float32), "from nan to nan"),
        (np.full((4, 4), -1, np.float32), "from -1.0 to -1.0"),
        (np.full((4, 4), -1, np.int32), "from -1 to -1"),
        (np.full((4, 4), np.inf, np.float32), "to inf"),
        (np.full((4, 4), 1e6, np.float32), "reach 1e[+]06; expected up to 1, 255 or 65535"),
    ],
)
def test_grey_levels_that_are_no_brightness_are_an_error(levels, why, tmp_path):
    with pytest.raises(OSError, match=why):
        read_image(grey_file(tmp_path, levels))


def _of_every_kind(folder):
    """Files that detectron2's own reader and this project's once read otherwise, and others."""
    for number, make in enumerate(DEEP.values()):
        (folder / str(number)).mkdir()
        yield make(folder / str(number))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, mode, options in (
        ("turned.jpg", "RGB", {"exif": exif}),
        ("turned.tif", "RGB", {"exif": exif}),
        ("palette.png", "P", {}),
        ("palette-alpha.png", "P", {"transparency": bytes([0, 128, 255])}),
        ("alpha.png", "RGBA", {}),
        ("grey-alpha.png", "LA", {}),
        ("ink.jpg", "CMYK", {}),
        ("bits.png", "1", {}),
    ):
        scene().convert("L" if mode in ("LA", "1") else "RGB").convert(mode).save(
            folder / name, **options
        )
        yield str(folder / name)


def test_detectron2s_mapper_reads_what_checks_and_pictures_show(tmp_path):
    for path in _of_every_kind(tmp_path):
        shown = np.asarray(read_image(path))
        record = {"file_name": path, "height": shown.shape[0], "width": shown.shape[1]}
        for order in ("RGB", "BGR"):
            mapper = DatasetMapper(is_train=False, augmentations=[], image_format=order)
            read = mapper(record)["image"].numpy().transpose(1, 2, 0)
            assert (read == (shown if order == "RGB" else shown[..., ::-1])).all(), path


@pytest.mark.parametrize(
    "content", [b"", b"text", b"<html></html>", b"%PDF-1.4", b"GIF89a", b"\xff\xd8\xff"]
)
def test_what_is_no_image_says_so_in_the_same_words_each_time(content):
    """Guards against messages with a memory address, which differ between workers."""
    messages = set()
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            read_image(io.BytesIO(content))
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


def test_folders_are_walked_alike_everywhere(tmp_path, caplog):
    """Hidden names are left out, links followed, circles of them not."""
    names = ["b/2.jpg", "a.PNG", ".c.jpg", ".d/e.jpg", "b/f.avif", "g", "b/notes.txt", "h.jpg?w=6"]
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "i.jpeg").touch()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "itself").symlink_to("itself")
    (tmp_path / "root" / "b" / "up").symlink_to("..")
    found = ["a.PNG", "b/2.jpg", "b/f.avif", "h.jpg?w=6", "link/i.jpeg"]
    assert images_in(str(tmp_path / "root"), beside=("txt",)) == found
    assert "2 files are left out" in caplog.text
    assert "suffix: g, itself" in caplog.text
    assert "b/notes.txt" in files_in(str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("a.JPG", "jpg"), ("a.b.jfif", "jfif"), ("what?.png", "png"), ("a.jpg?w=1.5", "jpg")),
        *(("a.txt", ""), ("jpg", "jpg"), ("a.", ""), ("a.jpg.part", ""), ("a.png?b.txt", "png")),
    ],
)
def test_a_name_says_whether_it_is_an_images(name, suffix):
    assert image_suffix(name) == suffix


def test_folders_without_images_and_none_at_all_are_refused_by_name(tmp_path):
    (tmp_path / "a.dat").touch()
    with pytest.raises(InputError, match=r"has no image.*1 file is left out.*: a\.dat"):
        images_in(str(tmp_path))
    for name in ("a.dat", "none"):
        with pytest.raises(InputError, match=f"{name}: the folder cannot be read"):
            files_in(str(tmp_path / name))
