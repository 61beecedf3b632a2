"""Caption files as they should be, and as users have them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.formats import Source, load_coco_captions, load_records
from pretrain.data.records import CaptionRecord
from virtex_d2.engine.errors import InputError


def content() -> dict:
    """Two images with two captions and one."""
    return {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "more/a.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "A dog."},
            {"id": 2, "image_id": 7, "caption": "A cat."},
            {"id": 3, "image_id": 3, "caption": "It sits."},
        ],
    }


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    (root / "b.jpg").touch()
    (root / "more" / "a.jpg").touch()
    return root


def write(folder: Path, what: object) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps(what))
    return path


def test_records_keep_the_order_of_images_and_of_captions(tmp_path, images):
    records = load_coco_captions(write(tmp_path, content()), images)
    assert list(records) == [
        CaptionRecord(7, str(images / "b.jpg"), ("A cat.",)),
        CaptionRecord(3, str(images / "more" / "a.jpg"), ("A dog.", "It sits.")),
    ]


def test_a_relative_image_folder_gives_absolute_paths(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = load_records(Source("coco", str(write(tmp_path, content())), "images"))
    assert [record.file_name for record in records] == [
        str(images / "b.jpg"),
        str(images / "more" / "a.jpg"),
    ]


def test_the_real_caption_files_load_whole(real_data):
    coco = real_data / "coco"
    for name, num_images, num_captions in (
        ("captions_pretrain", 1442, 7215),
        ("captions_pretrain_val", 479, 2395),
    ):
        records = load_coco_captions(coco / "annotations" / f"{name}.json", coco / "val2017")
        assert len(records) == num_images
        assert sum(len(record.captions) for record in records) == num_captions


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ('{"images": [', ["captions.json", "cut short", "Copy it again"]),
        ("\x00\x01", ["captions.json", "not JSON"]),
        ("[1]", ["found a list"]),
        ('{"images": []}', ["`annotations`", "['images']"]),
        ('{"images": 3, "annotations": []}', ["expected a list `images`"]),
        ('{"images": [], "annotations": []}', ["lists no images"]),
    ],
)
def test_a_file_that_is_no_captions_file_is_refused(tmp_path, images, text, messages):
    path = tmp_path / "captions.json"
    path.write_text(text)
    assert_refused(path, images, *messages)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path, images):
    assert_refused(tmp_path / "none.json", images, "none.json", "No such file")
    assert_refused(tmp_path, images, str(tmp_path), "Is a directory")


@pytest.mark.parametrize("caption", ["", " \n\t", None, 5, ["A dog."]])
def test_a_caption_without_text_is_refused_by_its_place(tmp_path, images, caption):
    bad = content()
    bad["annotations"][1]["caption"] = caption
    assert_refused(
        write(tmp_path, bad), images, "1 annotations lack a text", "annotations[1]", '"image_id": 7'
    )


@pytest.mark.parametrize("image_id", [None, [3], {"id": 3}, 0.5])
def test_a_caption_without_an_image_id_is_refused_by_its_place(tmp_path, images, image_id):
    bad = content()
    bad["annotations"][2]["image_id"] = image_id
    assert_refused(write(tmp_path, bad), images, "annotations[2]", "It sits.")


def test_captions_of_images_that_are_not_listed_are_counted_and_named(tmp_path, images):
    bad = content()
    bad["annotations"] += [{"image_id": 40 + i, "caption": "x"} for i in range(12)]
    message = assert_refused(write(tmp_path, bad), images, "12 image ids", "40, 41", "49.")
    assert ", 50" not in message


def test_an_image_without_a_caption_is_refused_by_name(tmp_path, images):
    bad = content()
    del bad["annotations"][1]
    assert_refused(write(tmp_path, bad), images, "1 images have no caption", "b.jpg (id 7)")


@pytest.mark.parametrize(
    "image", [{"id": 9}, {"file_name": "b.jpg"}, {"id": 9, "file_name": 4}, "b.jpg", None]
)
def test_an_image_without_id_or_file_name_is_refused_by_its_place(tmp_path, images, image):
    bad = content()
    bad["images"].append(image)
    assert_refused(write(tmp_path, bad), images, "images[2]", "`file_name`")


def test_two_images_of_one_id_are_refused_by_name(tmp_path, images):
    bad = content()
    bad["images"][1]["id"] = 7
    assert_refused(write(tmp_path, bad), images, "twice", "7 of b.jpg and more/a.jpg")


def test_absent_images_are_counted_and_the_first_ten_named(tmp_path, images):
    bad = content()
    for i in range(12):
        bad["images"].append({"id": 100 + i, "file_name": f"gone/{i}.jpg"})
        bad["annotations"].append({"image_id": 100 + i, "caption": "x"})
    message = assert_refused(
        write(tmp_path, bad), images, "12 of its 14 images", str(images / "gone" / "9.jpg")
    )
    assert "10.jpg" not in message


def test_an_absent_image_folder_is_refused_by_name(tmp_path):
    assert_refused(write(tmp_path, content()), tmp_path / "nowhere", "nowhere", "folder")
    assert_refused(write(tmp_path, content()), "", "DATA.TRAIN_IMAGES", "folder")


def test_braces_in_a_path_do_not_disturb_the_message(tmp_path, images):
    """Guards against formatting a message that already holds the user's path."""
    folder = tmp_path / "{0}{run}"
    folder.mkdir()
    bad = content()
    bad["annotations"].pop(1)
    assert_refused(write(folder, bad), images, "{0}{run}", "b.jpg")


def test_an_unknown_format_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(InputError, match=r"DATA\.FORMAT.*'coc'.*Did you mean 'coco'"):
        load_records(Source("coc", "captions.json", "images"))


KEYS = st.sampled_from(["id", "image_id", "file_name", "caption", "other"])
SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=200)
@given(
    images=st.lists(VALUES, max_size=3) | VALUES, annotations=st.lists(VALUES, max_size=3) | VALUES
)
def test_whatever_a_file_holds_it_gives_records_or_one_clear_error(
    tmp_path_factory, images, annotations
):
    folder = tmp_path_factory.getbasetemp()
    path = write(folder, {"images": images, "annotations": annotations})
    message, records = str(folder), []
    try:
        records = load_coco_captions(path, folder)
    except InputError as error:
        message = str(error)
    assert str(folder) in message
    assert all(record.captions for record in records)


def assert_refused(path: Path, images: Path | str, *messages: str) -> str:
    with pytest.raises(InputError) as caught:
        load_coco_captions(path, images)
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)
