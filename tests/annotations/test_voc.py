"""Folders of Pascal VOC's layout."""

import ast
import re
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from PIL import Image

from virtex_d2.annotations.usable import Use, require_usable
from virtex_d2.annotations.voc import VOC_CLASSES, read_voc_folder, split_ids
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes.world import CLASSES

pytestmark = pytest.mark.usefixtures("catalog_as_before")

OBJECT = (
    "<object><name>{name}</name>{more}<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>"
    "<ymax>{3}</ymax></bndbox></object>"
)


def write_voc(folder, objects, size=(40, 30), split="train"):
    """A folder of VOC's layout; `objects`: image id -> [(name, (xmin, ymin, xmax, ymax), more)]."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in objects))
    for image_id, items in objects.items():
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(
            folder / "JPEGImages" / f"{image_id}.jpg"
        )
        inside = "".join(OBJECT.format(*box, name=name, more=more) for name, box, more in items)
        (folder / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
            f"{inside}</annotation>"
        )
    return folder


@pytest.fixture
def folder(tmp_path):
    one = ("cat", (1, 1, 40, 30), "")
    two = ("dog", (5, 6, 20.5, 21), "<difficult>1</difficult>")
    return write_voc(tmp_path / "mine", {"a": [one, two], "b b": [two], "c": []})


def _config(*entries):
    cfg = get_virtex_cfg()
    cfg.MODEL.MASK_ON = False
    cfg.VIRTEX.DATASETS = [list(entry) for entry in entries]
    cfg.DATASETS.TRAIN = tuple(entry[0] for entry in entries)
    return cfg


def _check(folder, split="train", classes=VOC_CLASSES, chosen=False, **use):
    table = read_voc_folder(str(folder), split, "v", classes, chosen)
    require_usable(table, Use(**use))
    return table


def test_a_folder_is_read_with_vocs_classes_where_none_are_listed(folder):
    cfg = _config(("v", "voc", str(folder), "train"))
    (found,) = register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20
    assert list(found.categories.values()) == list(VOC_CLASSES)
    first, second, third = DatasetCatalog.get("v")
    assert (first["image_id"], first["width"], first["height"]) == ("a", 40, 30)
    assert first["annotations"][0]["bbox"] == [0, 0, 40, 30]  # the whole image
    assert second["file_name"].endswith("b b.jpg")
    assert [item["category_id"] for item in second["annotations"]] == [VOC_CLASSES.index("dog")]
    assert third["annotations"] == []
    assert MetadataCatalog.get("v").evaluator_type == "pascal_voc"


def test_other_classes_than_vocs_are_refused_with_the_entry_that_would_take_them(three_formats):
    with pytest.raises(InputError, match=r"none of VOC's 20: .*bolt") as caught:
        register_datasets(_config(("v", "voc", str(three_formats / "VOC"), "train")))
    classes = ast.literal_eval(re.search(r"'train', (\[.*?\])\]", str(caught.value)).group(1))
    assert "arrow" in classes  # which the other split has
    cfg = _config(("w", "voc", str(three_formats / "VOC"), "train", classes))
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(classes)


def test_the_listed_classes_are_the_detectors_in_that_order_and_others_are_counted(folder):
    (found,) = register_datasets(_config(("v", "voc", str(folder), "train", ["bird", "cat"])))
    assert found.categories == {0: "bird", 1: "cat"}
    assert "left out: dog 2" in found.size
    assert "no object of bird" in found.size
    numbers = [item["category_id"] for r in DatasetCatalog.get("v") for item in r["annotations"]]
    assert numbers == [1]


def test_a_misspelt_class_is_told_with_the_nearest(folder):
    (found,) = register_datasets(_config(("v", "voc", str(folder), "train", ["dogg", "cat"])))
    assert "no object of dogg Did you mean 'dog'?" in found.size


def test_sets_with_other_class_lists_do_not_go_together(folder):
    entries = [("v", "voc", str(folder), "train", names) for names in (["cat"], ["cat", "dog"])]
    with pytest.raises(InputError, match="'v' is taken by another data set"):
        register_datasets(_config(*entries))
    with pytest.raises(InputError, match="different categories"):
        register_datasets(_config(entries[0], ("w", *entries[1][1:])))


def test_detectron2s_own_loader_reads_the_same(three_formats):
    folder = str(three_formats / "VOC")
    register_datasets(_config(("v", "voc", folder, "train", list(CLASSES))))
    ours = DatasetCatalog.get("v")
    theirs = load_voc_instances(folder, "train", CLASSES)
    assert len(ours) == 6
    assert [{**record, "image_id": str(record["image_id"])} for record in theirs] == ours


def test_images_of_another_suffix_and_splits_of_one_image_are_read(folder):
    (folder / "ImageSets/Main/one.txt").write_text("c")
    (folder / "JPEGImages/c.jpg").rename(folder / "JPEGImages/c.PNG")
    (file,) = _check(folder, "one").files
    assert file.endswith("c.PNG")


def test_a_mask_head_is_refused(folder):
    with pytest.raises(InputError, match="boxes and no masks.*MODEL.MASK_ON False"):
        _check(folder, masks=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "ImageSets"), "ImageSets/Main is not there"),
        (
            lambda f: shutil.rmtree(f / "JPEGImages"),
            "JPEGImages is not there, and so are not 3 images",
        ),
        (lambda f: (f / "JPEGImages/a.jpg").unlink(), "image a .*a.jpg is not there"),
        (lambda f: (f / "Annotations/a.xml").unlink(), "a.xml .*: No such file"),
        (
            lambda f: (f / "Annotations/a.xml").write_text("<annot"),
            "a.xml .*: not XML: unclosed token",
        ),
        (lambda f: (f / "Annotations/a.xml").write_text("<x/>"), "size/width is missing"),
        (lambda f: _replace(f, "<xmin>1<", "<xmin>one<"), "bndbox/xmin is 'one'"),
        (lambda f: _replace(f, "<name>cat<", "<name> <"), "a.xml, object 1 .*: it has no name"),
        (lambda f: _replace(f, "<width>40<", "<width>0<"), "size/width is 0, expected"),
        (
            lambda f: _replace(f, "<xmax>40<", "<xmax>90<"),
            "a.xml, object 1 .*: xmin 1.*xmax 90.* 50.0 px outside the 40x30",
        ),
        (lambda f: _replace(f, "<xmax>40<", "<xmax>0<"), "no width or height.*xmax 0"),
        (lambda f: _list(f, ""), "train.txt: is empty"),
        (lambda f: _list(f, "a  1\nc -1"), "2 lines have a mark behind"),
        (lambda f: _list(f, "a\na"), "id there twice .1.: image a"),
    ],
)
def test_what_is_wrong_with_a_folder_is_counted_and_named(change, message, folder):
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        _check(folder)
    assert str(folder) in str(caught.value)


def _replace(folder, old, new):
    path = folder / "Annotations/a.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def _list(folder, text):
    (folder / "ImageSets/Main/train.txt").write_text(text)


def test_a_split_that_is_read_alone_lists_each_image_once(folder):
    _list(folder, "a\na")
    with pytest.raises(InputError, match="1 images are listed more than once: a"):
        split_ids(str(folder), "train")


def test_an_unknown_split_is_told_with_those_that_are_there(folder):
    with pytest.raises(InputError, match=r"split 'trian'.*there are train. Did you mean 'train'"):
        _check(folder, split="trian")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([], r"expected entries \[name, 'voc', folder, split\[, classes\]\]"),
        (["train", "cat"], "expected entries"),
        (["train", []], "expected entries"),
        (["train", ["cat", "cat"]], "lists classes more than once: cat"),
    ],
)
def test_a_malformed_entry_is_shown(rest, message, folder):
    with pytest.raises(InputError, match=message):
        register_datasets(_config(("v", "voc", str(folder), *rest)))


def test_the_real_folder_passes_with_all_of_its_classes_or_with_five(real_data):
    folder = str(real_data / "VOC2007")
    assert len(_check(folder, "trainval").image_ids) == 450
    table = _check(folder, "test", ("bus", "car", "cat", "person", "train"), chosen=True)
    assert len(table.image_ids) == 400
    assert "aeroplane" in table.unlisted
