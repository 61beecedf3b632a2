"""A detector's data sets as images of several classes, and the SVMs on several stages of them."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.probes.small_sets import COLOURS, picture, write_voc
from virtex_d2.detection.datasets import take_fraction
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.probes.config import check_config
from virtex_d2.studies.probes.data import load_datasets

CATEGORIES = [{"id": 30, "name": "red"}, {"id": 4, "name": "green"}, {"id": 11, "name": "blue"}]
BOX = {"bbox": [2, 2, 9, 9], "area": 81}


@pytest.fixture
def coco(tmp_path):
    """`coco(split, [[(category, crowd), ...] of each image], ...)` -> the JSON file."""

    def write(split, objects, categories=CATEGORIES, **more):
        folder = tmp_path / split
        folder.mkdir(exist_ok=True)
        known = {category["id"]: category["name"] for category in CATEGORIES}
        for number, found in enumerate(objects):
            colour = COLOURS[known[found[0][0]]] if found else (120, 120, 120)
            picture(colour, number + len(split)).save(folder / f"{number}.png")
        content = {
            "images": [
                {"id": 7 + n, "file_name": f"{n}.png", "width": 40, "height": 34, **more}
                for n in range(len(objects))
            ],
            "annotations": [
                {"id": 100 * n + k, "image_id": 7 + n, "category_id": c, "iscrowd": crowd, **BOX}
                for n, found in enumerate(objects)
                for k, (c, crowd) in enumerate(found, start=1)
            ],
            "categories": categories,
        }
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        return path

    return write


def sets(name, kind="coco", **paths):
    """The keys of data sets of their own names."""
    entries = [[f"{name}_{s}", kind, str(p), str(p.with_suffix(""))] for s, p in paths.items()]
    return [
        *("DATA.FORMAT", "detection", "VIRTEX.DATASETS", repr(entries)),
        *("DATA.TRAIN", f"{name}_train", "DATA.TEST", f"{name}_test"),
    ]


@pytest.fixture
def colours(coco):
    """24 training images and 12 test images, each with an object of one colour."""
    objects = [[(category["id"], 0)] for category in CATEGORIES]
    return {"train": coco("train", 8 * objects), "test": coco("test", 4 * objects)}


def test_an_image_holds_the_classes_of_its_objects_and_crowds_decide_nothing(make_cfg, coco):
    objects = [[(30, 0), (30, 1), (4, 0)], [(30, 1)], []]
    files = {"train": coco("train", objects), "test": coco("test", [[(11, 0)]])}
    train, test = load_datasets(make_cfg(*sets("holds", **files)))
    assert train.classes == ("green", "blue", "red")  # by id
    assert train.labels.tolist() == [[1, -1, 1], [-1, -1, 0], [-1, -1, -1]]
    assert test.labels.tolist() == [[-1, 1, -1]]
    assert train.files[1].endswith("train/1.png")


def test_of_lvis_a_class_that_nobody_looked_for_is_neither_there_nor_absent(make_cfg, coco):
    lists = {"neg_category_ids": [4], "not_exhaustive_category_ids": []}
    categories = [{**category, "frequency": "f"} for category in CATEGORIES]
    files = {
        split: coco(split, [[(30, 0)], []], categories, **lists) for split in ("train", "test")
    }
    train, _ = load_datasets(make_cfg(*sets("lvis", "lvis", **files)))
    assert train.labels.tolist() == [[-1, 0, 1], [-1, 0, 0]]


def test_vocs_difficult_objects_are_as_in_a_voc_folder(make_cfg, tmp_path, monkeypatch):
    images = {"a": [("dog", False)], "b": [("dog", True), ("cat", False)], "c": []}
    write_voc(tmp_path / "VOC", images, {"trainval": ["a", "b"], "test": ["c"]})
    for path in (tmp_path / "VOC" / "Annotations").iterdir():
        text = path.read_text().replace(
            "<object>",
            "<object><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>",
        )
        size = "<annotation><size><width>40</width><height>34</height></size>"
        path.write_text(text.replace("<annotation>", size))
    entries = [[f"v_{s}", "voc", str(tmp_path / "VOC"), s] for s in ("trainval", "test")]
    names = ["DATA.TRAIN", "v_trainval", "DATA.TEST", "v_test"]
    cfg = make_cfg("DATA.FORMAT", "detection", "VIRTEX.DATASETS", repr(entries), *names)
    folder = load_datasets(make_cfg("DATA.ROOT", tmp_path / "VOC"))
    for own, same in zip(load_datasets(cfg), folder):
        assert (own.files, own.classes) == (same.files, same.classes)
        assert np.array_equal(own.labels, same.labels)


def test_a_fraction_has_the_images_that_a_detector_has(make_cfg, colours):
    keys = ["VIRTEX.FRACTION", 0.5, "VIRTEX.FRACTION_SEED", 3]
    train, test = load_datasets(make_cfg(*sets("half", **colours), *keys))
    drawn = take_fraction([{"image_id": 7 + n} for n in range(24)], 0.5, 3)
    assert [int(f.split("/")[-1][:-4]) + 7 for f in train.files] == [r["image_id"] for r in drawn]
    assert len(test.files) == 12
    with pytest.raises(InputError, match="VIRTEX.FRACTION is 0.5; only DATA.FORMAT detection"):
        check_config(make_cfg("VIRTEX.FRACTION", 0.5))


def test_several_sets_are_one(make_cfg, colours):
    folder = shutil.copytree(colours["train"].with_suffix(""), colours["train"].parent / "copies")
    entries = [
        [f"several_{name}", "coco", str(file), str(images)]
        for name, file, images in (
            ("train", colours["train"], colours["train"].with_suffix("")),
            ("copies", colours["train"], folder),
            ("test", colours["test"], colours["test"].with_suffix("")),
        )
    ]
    names = ["DATA.TRAIN", "several_train, several_copies", "DATA.TEST", "several_test"]
    cfg = make_cfg("DATA.FORMAT", "detection", "VIRTEX.DATASETS", repr(entries), *names)
    train, _ = load_datasets(cfg)
    assert len(train.files) == len(set(train.files)) == 48
    assert train.labels.shape == (48, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: {**files, "test": files["train"]}, "24 of its images are training images"),
        (lambda files: files | {"test": "other"}, "categories are not those of .*train.json"),
    ],
)
def test_what_could_not_be_tested_is_refused(make_cfg, coco, colours, change, message):
    files = change(colours)
    if files["test"] == "other":
        files["test"] = coco("other", [[(4, 0)]], CATEGORIES[1:])
    name = f"refused{len(message)}"
    with pytest.raises(InputError, match=message):
        load_datasets(make_cfg(*sets(name, **files)))


def test_each_stage_is_judged_as_it_is_alone(probe, colours, tmp_path):
    words = sets("stages", **colours)
    stages = ("MODEL.RESNETS.OUT_FEATURES", "['res3','res5']", "OUTPUT_DIR", tmp_path / "both")
    both = probe(*words, *stages)
    assert list(both) == ["res3/mAP11", "res3/mAP", "res5/mAP11", "res5/mAP"]
    alone = probe(*words)
    assert {"res5/mAP11": alone["mAP11"], "res5/mAP": alone["mAP"]}.items() <= both.items()
    assert both["res3/mAP"] > 90
    with open(tmp_path / "both" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["features"], row["class"]) for row in rows[::3]] == [
        ("res3", "green"),
        ("res5", "green"),
    ]
    with pytest.raises(InputError, match="OUT_FEATURES was .*'res3', 'res5'.*now it is .*'res5'"):
        probe(*words, "OUTPUT_DIR", tmp_path / "both", resume=True)


@pytest.mark.parametrize("features", [["res3"], ["res5", "res3"], ["res5", "res5"], []])
def test_features_of_another_order_are_refused(probe, voc, features):
    with pytest.raises(InputError, match="OUT_FEATURES is"):
        probe("DATA.ROOT", voc, "MODEL.RESNETS.OUT_FEATURES", repr(features))
