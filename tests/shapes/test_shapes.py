"""The synthetic captioned world: the same everywhere, true captions, readable by every API."""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lvis import LVIS
from PIL import Image
from pycocotools.coco import COCO

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes.main import draw_contact_sheet, main
from virtex_d2.studies.shapes.world import CLASSES, COLORS, PATTERNS, SIZES, rasterize, render
from virtex_d2.studies.shapes.write import polygons, write_dataset

SEEDS = st.integers(0, 2**31)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@given(SEEDS)
@settings(max_examples=60)
def test_a_caption_is_short_and_names_a_shape(seed):
    shapes = {*CLASSES, *(f"{name}s" for name in CLASSES), "crosses", "objects", "things"}
    for text in render(seed, 0).captions:
        words = text.replace(",", "").split()
        assert 2 <= len(words) <= 25
        assert text == text.lower()
        assert shapes & set(words)


@given(SEEDS)
@settings(max_examples=40)
def test_five_captions_name_every_object(seed):
    scene = render(seed, 3)
    named = " ".join(scene.captions)
    assert all(item.name in named for item in scene.objects)


@given(SEEDS, st.sampled_from([64, 128, 200]))
@settings(max_examples=40)
def test_masks_are_disjoint_visible_and_inside_their_boxes(seed, size):
    scene = render(seed, 1, size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert 1 <= len(scene.objects) <= 6
    assert sum(item.mask.astype(int) for item in scene.objects).max() == 1
    for item in scene.objects:
        x, y, width, height = item.box
        rows, columns = np.nonzero(item.mask)
        assert (columns.min(), columns.max()) == (x, x + width - 1)
        assert (rows.min(), rows.max()) == (y, y + height - 1)
        assert item.size in SIZES
        assert item.color in COLORS
        assert item.pattern in PATTERNS


def test_wording_varies_over_the_whole_vocabulary():
    texts = [text for i in range(300) for text in render(5, i).captions]
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert set(CLASSES) | set(COLORS) | {"left", "right", "above", "below", "behind"} <= words
    assert 80 <= len(words) <= 200
    skeletons = {
        " ".join("_" if w in CLASSES or w in COLORS else w for w in text.split()) for text in texts
    }
    assert len(skeletons) > 500, "captions follow few templates"


@pytest.mark.parametrize("name", CLASSES)
def test_a_shape_covers_a_sensible_part_of_its_circle(name):
    mask = rasterize(name, (64, 64), 40, 0, 128)
    share = mask.sum() / (np.pi * 40**2)
    assert 0.15 < share <= 1.02
    assert not mask[:22].any()
    assert not mask[107:].any()


def test_shapes_differ_from_each_other_at_any_turn():
    masks = {
        name: [rasterize(name, (32, 32), 26, turn, 64) for turn in (-25, 0, 25)] for name in CLASSES
    }
    for a in CLASSES:
        for b in CLASSES:
            if a < b:
                most = max((x & y).sum() / (x | y).sum() for x in masks[a] for y in masks[b])
                assert most < 0.95, (a, b)


def test_the_world_is_the_same_on_every_machine(tmp_path):
    scene = render(7, 11, 128)
    assert digest(scene.image.tobytes()) == "ccc22c42f981111d"
    assert digest(repr([*scene.captions]).encode()) == "39668b38350a672e"
    write_dataset(tmp_path, "train", 5, 96, seed=7, formats=("coco", "lvis", "voc"))
    annotations = tmp_path / "annotations"
    assert {
        "jpeg": digest((tmp_path / "images/train/000003.jpg").read_bytes()),
        "captions": digest((annotations / "captions_train.json").read_bytes()),
        "instances": digest((annotations / "instances_train.json").read_bytes()),
        "lvis": digest((annotations / "lvis_v1_train.json").read_bytes()),
        "voc": digest((tmp_path / "VOC/Annotations/train_000003.xml").read_bytes()),
    } == GOLDEN


GOLDEN = {
    "jpeg": "e15eb34c62769778",
    "captions": "16233b3933e44ad2",
    "instances": "1d56eb23bf5d122c",
    "lvis": "92d238b56b8516c8",
    "voc": "af1513a4b9efac3b",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, "train", 40, 128, seed=1, formats=("coco", "lvis", "voc"))
    return folder


def test_polygons_give_the_visible_masks_back(world):
    coco = COCO(str(world / "annotations" / "instances_train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    seen = 0
    for index in range(40):
        annotations = coco.loadAnns(coco.getAnnIds(index + 1))
        objects = render(1, index, 128).objects
        assert len(annotations) == len(objects)
        for annotation, item in zip(annotations, objects):
            mask = coco.annToMask(annotation).astype(bool)
            assert (mask & item.mask).sum() / (mask | item.mask).sum() > 0.9
            assert annotation["bbox"] == list(item.box)
            assert annotation["area"] == item.mask.sum()
            assert CLASSES[annotation["category_id"] - 1] == item.name
            seen += 1
    assert seen > 80


def test_images_on_disk_are_the_rendered_ones(world):
    captions = json.loads((world / "annotations" / "captions_train.json").read_text())
    assert len(captions["annotations"]) == 200
    for index, image in enumerate(captions["images"][:5]):
        pixels = np.asarray(Image.open(world / "images" / "train" / image["file_name"]))
        difference = np.abs(pixels.astype(int) - render(1, index, 128).image)
        assert difference.mean() < 5


def test_lvis_and_voc_say_the_same_as_coco(world):
    coco = COCO(str(world / "annotations" / "instances_train.json"))
    lvis = LVIS(str(world / "annotations" / "lvis_v1_train.json"))
    assert sorted(lvis.imgs) == sorted(coco.imgs)
    names = (world / "VOC/ImageSets/Main/train.txt").read_text().split()
    for image_id in coco.imgs:
        boxes = sorted(
            (CLASSES[a["category_id"] - 1], *a["bbox"])
            for a in coco.loadAnns(coco.getAnnIds(image_id))
        )
        theirs = lvis.load_anns(lvis.get_ann_ids(img_ids=[image_id]))
        assert sorted((CLASSES[a["category_id"] - 1], *a["bbox"]) for a in theirs) == boxes
        present = {a["category_id"] for a in theirs}
        absent = set(lvis.imgs[image_id]["neg_category_ids"])
        assert present | absent == set(range(1, len(CLASSES) + 1))
        assert not present & absent
        root = ET.parse(world / "VOC/Annotations" / f"{names[image_id - 1]}.xml").getroot()
        corners = []
        for node in root.iter("object"):
            x0, y0, x1, y1 = (int(v.text) for v in node.find("bndbox"))
            corners.append((node.find("name").text, x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1))
        assert sorted(corners) == boxes
        assert (world / "VOC/JPEGImages" / f"{names[image_id - 1]}.jpg").is_file()


def test_an_existing_split_is_kept_unless_it_is_to_be_replaced(tmp_path):
    write_dataset(tmp_path, "train", 3, 64, seed=1)
    before = (tmp_path / "images/train/000000.jpg").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write_dataset(tmp_path, "train", 2, 64, seed=2)
    assert (tmp_path / "images/train/000000.jpg").read_bytes() == before
    write_dataset(tmp_path, "train", 2, 64, seed=2, overwrite=True)
    assert len(list((tmp_path / "images/train").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_an_overwritten_split_leaves_no_annotations_of_the_images_it_replaces(tmp_path):
    """LVIS and VOC files of the old images stayed beside the new ones."""
    write_dataset(tmp_path, "train", 3, 64, seed=1, formats=("coco", "lvis", "voc"))
    write_dataset(tmp_path, "train_2", 2, 64, seed=1, formats=("coco", "voc"))
    write_dataset(tmp_path, "train", 2, 64, seed=2, overwrite=True)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in files if "train_2" not in name} == {
        "images/train/000000.jpg",
        "images/train/000001.jpg",
        "annotations/captions_train.json",
        "annotations/instances_train.json",
    }
    assert "VOC/JPEGImages/train_2_000001.jpg" in files


def test_numpy_integers_give_the_scene_of_plain_ones():
    """numpy spells np.int64(5), and the spelling went into the seed."""
    scene, other = render(5, 3, 64), render(np.int64(5), np.uint8(3), np.int32(64))
    assert (scene.image == other.image).all()
    assert scene.captions == other.captions


def test_a_size_that_is_no_whole_number_is_refused():
    with pytest.raises(InputError, match="size is 96.5; expected a whole number"):
        render(0, 0, 96.5)


def test_an_output_that_is_a_file_is_an_input_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="no folder can be made"):
        write_dataset(tmp_path / "taken", "train", 1, 64)
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_contact_sheet_is_drawn_into_a_new_folder_or_refused(tmp_path):
    draw_contact_sheet(tmp_path / "new" / "sheet.png", seed=1, size=64, count=2)
    assert np.asarray(Image.open(tmp_path / "new" / "sheet.png")).std() > 10
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write the contact sheet"):
        draw_contact_sheet(tmp_path / "file" / "sheet.png", seed=1, size=64, count=1)


def test_an_empty_mask_has_no_polygon():
    assert polygons(np.zeros((64, 64), bool)) == []


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("virtex_d2.studies.shapes.write._write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path, "train", 3, 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "32"), "size is 32; expected 64 to 512"),
        (("--num-images", "0"), "--num-images 0"),
        (("--max-objects", "9"), "max_objects is 9; expected 1 to 6"),
        (("--split", "a/b"), "--split 'a/b'"),
        (("--format", "coc"), "Did you mean 'coco'"),
        (("--seed", "-1"), "seed is -1"),
    ],
)
def test_the_tool_refuses_bad_arguments_by_name(tmp_path, arguments, message):
    output = tmp_path / "world"
    with pytest.raises(InputError, match=re.escape(message)):
        main(["--output", str(output), *arguments])
    assert not output.exists()


def test_the_tool_answers_with_a_line_and_a_contact_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    words = ["--output", str(tmp_path / "world"), "--num-images", "2", "--size", "64"]
    main([*words, "--contact-sheet", str(sheet)])
    assert "split train, 2 images, coco" in capsys.readouterr().out
    assert sheet.is_file()
