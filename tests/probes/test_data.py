"""Labelled images: VOC's layout, a folder for each class, iNaturalist's JSON; what is refused."""

import json
import shutil

import numpy as np
import pytest

from tests.probes.small_sets import write_voc
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.probes.data import VOC_CLASSES, load_datasets


@pytest.fixture
def small_voc(tmp_path):
    """Two splits of VOC's own classes, with difficult objects."""
    images = {
        "a": [("dog", False), ("dog", True)],
        "b": [("dog", True), ("cat", False)],
        "c": [("cat", True)],
        "d": [],
        "e": [("dog", False)],
    }
    write_voc(tmp_path / "VOC", images, {"trainval": ["a", "b", "c"], "test": ["d", "e"]})
    return tmp_path / "VOC"


def test_an_image_holds_a_class_if_one_of_its_objects_is_not_difficult(make_cfg, small_voc):
    cfg = make_cfg("DATA.ROOT", small_voc, "DATA.CLASSES", ["cat", "dog"])
    train, test = load_datasets(cfg)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [[-1, 1], [1, 0], [0, -1]]
    assert test.labels.tolist() == [[-1, -1], [-1, 1]]
    assert train.files[0] == str(small_voc / "JPEGImages" / "a.jpg")


def test_without_a_list_the_classes_are_vocs_twenty(make_cfg, small_voc):
    train, _ = load_datasets(make_cfg("DATA.ROOT", small_voc))
    assert train.classes == tuple(VOC_CLASSES)
    assert len(train.classes) == 20


def test_labels_are_vocs_own_of_the_classes_that_the_real_subset_reports(make_cfg, real_data):
    cfg = make_cfg("DATA.ROOT", real_data / "VOC2007", "DATA.CLASSES", ["bus", "person"])
    train, test = load_datasets(cfg)
    assert (len(train.files), len(test.files)) == (450, 400)
    name = "000060"
    xml = (real_data / "VOC2007" / "Annotations" / f"{name}.xml").read_text()
    [images] = [i for i in (train, test) if any(name in file for file in i.files)]
    row = images.labels[[name in file for file in images.files].index(True)]
    assert (row == 1).tolist() == [f"<name>{c}</name>" in xml for c in ("bus", "person")]
    assert set(np.unique(train.labels)) == {-1, 0, 1}


def _write(path, text):
    path.write_text(text)


VOC_DAMAGES = {
    "no such split": (lambda v: (v / "ImageSets/Main/test.txt").unlink(), r"test.txt: .*trainval"),
    "no folder": (lambda v: shutil.rmtree(v / "JPEGImages"), r"there is no JPEGImages"),
    "no XML": (lambda v: (v / "Annotations/c.xml").unlink(), r"c\.xml"),
    "cut XML": (
        lambda v: _write(v / "Annotations/c.xml", "<annotation><obj"),
        r"c\.xml.*cut short",
    ),
    "unknown class": (
        lambda v: _write(v / "Annotations/c.xml", "<a><object><name>unicorn</name></object></a>"),
        r"c\.xml: 'unicorn' is none of VOC's",
    ),
    "odd difficulty": (
        lambda v: _write(
            v / "Annotations/c.xml",
            "<a><object><name>cat</name><difficult>maybe</difficult></object></a>",
        ),
        r"c\.xml: object 1 .*'maybe'",
    ),
    "in both splits": (
        lambda v: _write(v / "ImageSets/Main/test.txt", "d\na\n"),
        r"1 images are in both splits.*a\.",
    ),
    "twice": (lambda v: _write(v / "ImageSets/Main/test.txt", "d\nd\n"), r"more than once: d"),
    "empty list": (lambda v: _write(v / "ImageSets/Main/test.txt", "\n"), r"is empty"),
}


@pytest.mark.parametrize("damage", VOC_DAMAGES)
def test_a_damaged_voc_folder_is_refused_with_the_file(make_cfg, small_voc, damage):
    change, message = VOC_DAMAGES[damage]
    change(small_voc)
    with pytest.raises(InputError, match=message):
        load_datasets(make_cfg("DATA.ROOT", small_voc))


def test_a_class_that_nothing_has_is_refused_with_the_nearest_one(make_cfg, small_voc):
    cfg = make_cfg("DATA.ROOT", small_voc, "DATA.CLASSES", ["cats"])
    with pytest.raises(InputError, match=r"has cats; it has cat, dog.* Did you mean 'cat'"):
        load_datasets(cfg)


FOLDERS = ("TASK", "linear", "DATA.FORMAT", "folders", "DATA.TRAIN", "train", "DATA.TEST", "val")
JSON = (
    *("TASK", "finetune", "DATA.FORMAT", "inaturalist"),
    *("DATA.TRAIN", "train.json", "DATA.TEST", "val.json"),
)


def test_a_folder_is_a_class_and_its_images_may_lie_deeper(make_cfg, folders):
    deeper = folders / "train" / "red" / "deeper"
    deeper.mkdir()
    shutil.copy(folders / "train" / "red" / "0.png", deeper / "x.PNG")
    (deeper / "notes.txt").write_text("no image")
    train, test = load_datasets(make_cfg("DATA.ROOT", folders, *FOLDERS))
    assert train.classes == test.classes == ("blue", "green", "red")
    assert len(train.files) == 25
    assert all(
        train.classes[label] in file.split("/") for file, label in zip(train.files, train.labels)
    )


def test_linked_folders_inside_a_class_are_read_and_what_is_left_out_is_named(
    make_cfg, folders, caplog, tmp_path
):
    pool = tmp_path / "pool"
    shutil.copytree(folders / "train" / "red", pool)
    (folders / "train" / "red" / "more").symlink_to(pool)
    (folders / "train" / "red" / "circle").symlink_to(folders / "train")
    (folders / "train" / ".cache").mkdir()
    (folders / "train" / "blue" / "x.heic").touch()
    (folders / "train" / "blue" / "y.jfif").touch()
    train, _ = load_datasets(make_cfg("DATA.ROOT", folders, *FOLDERS))
    assert [int((train.labels == label).sum()) for label in range(3)] == [9, 8, 16]
    assert "1 file is left out" in caplog.text
    assert "blue/x.heic" in caplog.text


def test_one_class_is_refused_and_the_folder_below_named(make_cfg, folders):
    """Every answer would be right."""
    cfg = make_cfg("DATA.ROOT", folders, *FOLDERS)
    (folders / "wrapped").mkdir()
    (folders / "train").rename(folders / "wrapped" / "images")
    (folders / "wrapped").rename(folders / "train")
    shutil.copytree(folders / "val", folders / "copy")
    shutil.copytree(folders / "copy", folders / "val" / "images")
    for name in ("blue", "green", "red"):
        shutil.rmtree(folders / "val" / name)
    with pytest.raises(InputError, match=r"one class, 'images'.*blue, green, red.*train/images"):
        load_datasets(cfg)
    for name in ("blue", "green"):
        shutil.rmtree(folders / "train" / "images" / name)
    cfg.DATA.TRAIN = "train/images"
    with pytest.raises(InputError, match=r"one class, 'red'.*two classes or more"):
        load_datasets(cfg)


def test_inaturalists_images_of_one_class_are_refused(make_cfg, inaturalist):
    path = inaturalist / "train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"train.json: all images are of one class, '7 red'"):
        load_datasets(make_cfg("DATA.ROOT", inaturalist, *JSON))


def test_a_test_set_may_lack_classes_but_not_have_others(make_cfg, folders):
    cfg = make_cfg("DATA.ROOT", folders, *FOLDERS)
    shutil.rmtree(folders / "val" / "green")
    _, test = load_datasets(cfg)
    assert test.classes == ("blue", "green", "red")
    assert {file.split("/")[-2]: int(label) for file, label in zip(test.files, test.labels)} == {
        "blue": 0,
        "red": 2,
    }
    (folders / "val" / "red").rename(folders / "val" / "reds")
    with pytest.raises(InputError, match=r"1 of its classes .*reds.* Did you mean 'red'"):
        load_datasets(cfg)


def test_empty_class_folders_and_loose_images_are_refused(make_cfg, folders):
    cfg = make_cfg("DATA.ROOT", folders, *FOLDERS)
    (folders / "train" / "white").mkdir()
    with pytest.raises(InputError, match=r"train: 1 of its 4 class folders .*white"):
        load_datasets(cfg)
    shutil.rmtree(folders / "train")
    (folders / "train").mkdir()
    shutil.copy(folders / "val" / "red" / "0.png", folders / "train")
    with pytest.raises(InputError, match="expected a folder of images for each class"):
        load_datasets(cfg)


def test_a_set_is_not_tested_on_itself(make_cfg, folders):
    with pytest.raises(InputError, match="tested on itself"):
        load_datasets(make_cfg("DATA.ROOT", folders, *FOLDERS, "DATA.TEST", "train"))


def test_inaturalists_categories_are_told_by_their_ids(make_cfg, inaturalist):
    train, test = load_datasets(make_cfg("DATA.ROOT", inaturalist, *JSON))
    assert train.classes == test.classes == ("3 green", "7 red", "11 blue")
    for images in (train, test):
        for file, label in zip(images.files, images.labels):
            assert file.split("/")[-2] == images.classes[label].split()[1]


JSON_DAMAGES = {
    "no annotations": (lambda c: c.pop("annotations"), r"list in `annotations`, found nothing"),
    "no file name": (lambda c: c["images"][2].pop("file_name"), r"`images`\[2\] lacks file_name"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=9), r"1 annotations .*id 9"),
    "unknown class": (lambda c: c["annotations"][0].update(category_id=5), r"category_id 5"),
    "two labels": (lambda c: c["annotations"][1].update(image_id=50), r"more than one annot.* 50"),
    "no label": (lambda c: c["annotations"].pop(), r"1 images have no annotation.*id 73"),
    "two images of an id": (lambda c: c["images"].append(c["images"][0]), r"more than one image"),
    "two categories of an id": (
        lambda c: c["categories"].append({"id": 7, "name": "pink"}),
        r"more than one category.*id 7",
    ),
    "an id of no type": (lambda c: c["images"][1].update(id=[]), r"`images`\[1\] lacks id"),
    "a name of no type": (lambda c: c["images"][0].update(file_name=3), r"\[0\] lacks file_name"),
    "ids of two types": (lambda c: c["categories"][0].update(id="7"), r"category_id 7"),
    "no images": (lambda c: c.update(images=[], annotations=[]), r"`images` is empty"),
}


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_inaturalist_file_is_refused_with_the_record(make_cfg, inaturalist, damage):
    change, message = JSON_DAMAGES[damage]
    path = inaturalist / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        load_datasets(make_cfg("DATA.ROOT", inaturalist, *JSON))
    assert "train.json" in str(error.value)
