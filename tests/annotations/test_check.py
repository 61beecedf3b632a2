"""One record broken of each kind, or leaked: it is found, named, and nothing else is."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.annotations.conftest import edit, read
from virtex_d2.annotations.checks import check, leaks
from virtex_d2.annotations.table import KINDS
from virtex_d2.annotations.voc import read_voc_folder
from virtex_d2.detection.sources import read_annotations
from virtex_d2.studies.check_dataset.page import summary

KINDS_OF_FILES = ("coco", "lvis", "voc")


def found(world, kind="coco"):
    """(kind, record) of all problems."""
    return [(each.kind, each.record) for each in check(read(world, kind)).problems]


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_sound_data_set_has_no_problem(kind, sound):
    checked = check(read(sound, kind))
    assert checked.problems == []
    assert checked.sound
    assert len(checked.decoded) == 5


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_formats_of_one_data_set_are_read_alike(kind, sound):
    coco, other = read(sound), read(sound, kind)
    assert np.allclose(other.boxes, coco.boxes)
    assert other.image_of.tolist() == coco.image_of.tolist()
    assert (other.sizes == 64).all()
    names = [
        [list(table.categories.values())[number] for number in table.category_of]
        for table in (coco, other)
    ]
    assert names[0] == names[1]


def first(content):
    return content["annotations"][0]


RLE = {"counts": [0, 64 * 64], "size": [64, 64]}
SMALL = [[10, 10, 20, 10, 20, 20, 10, 20]]


def with_mask(mask, box=(0, 0, 64, 64)):
    return lambda c: first(c).update(segmentation=mask, bbox=list(box))


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (lambda c: first(c).update(bbox=[1, 2, 3]), "box-malformed", r"expected \[x, y"),
        (lambda c: first(c).update(bbox=None), "box-malformed", ""),
        (lambda c: first(c).update(bbox=[1, 2, 3, "4"]), "box-malformed", ""),
        (lambda c: first(c).update(bbox=[1, 2, float("nan"), 4]), "box-malformed", ""),
        (lambda c: first(c).update(bbox=[1, 2, True, 4]), "box-malformed", ""),
        (lambda c: first(c).update(bbox=[1, 2, 10**400, 4]), "box-malformed", ""),
        (lambda c: first(c).update(bbox=[5, 5, 0, 9]), "box-empty", r"bbox \[5, 5, 0, 9\]"),
        (lambda c: first(c).update(bbox=[5, 5, 9, -1]), "box-empty", ""),
        (with_mask(RLE, (1, 1, 66, 63)), "box-outside", "reaches 3.0 px outside the 64x64"),
        (lambda c: first(c).pop("segmentation"), "mask-missing", "no segmentation"),
        (lambda c: first(c).update(segmentation=[]), "mask-missing", ""),
        (with_mask("x"), "mask-malformed", "found a str"),
        (with_mask([3]), "mask-malformed", "found a int in it"),
        (with_mask([[1, 2, 3, 4]]), "mask-malformed", "has 4 numbers"),
        (with_mask([[1, 2, 3, 4, 5, 6, 7]]), "mask-malformed", "has 7 numbers"),
        (with_mask([[1, 2, 3, 4, 5, None]]), "mask-malformed", "coordinate None"),
        (with_mask([[1, 2, 3, 4, 5, True]]), "mask-malformed", "coordinate True"),
        (with_mask([[1, 2, 3, 4, 5, "6"]]), "mask-malformed", "coordinate '6'"),
        (with_mask([[1, 2, 3, 4, 5, 10**400]]), "mask-malformed", "coordinate 1000"),
        (with_mask([[1, 2, 3, 4, 5, float("inf")]]), "mask-malformed", "not finite"),
        (with_mask([[1, 2, 1, 2, 1, 2]]), "mask-empty", "enclose nothing"),
        (with_mask([[0, 0, 70, 0, 70, 64, 0, 64]]), "mask-outside", "reaches 6.0 px outside"),
        (with_mask({"counts": [0, 6], "size": [2, 3]}), "mask-size", "3x2, that of the image 64x"),
        (with_mask({"counts": [0, 9], "size": [64, 64]}), "mask-malformed", "runs have 9 pixels"),
        (with_mask({"counts": [-1, 4097], "size": [64, 64]}), "mask-malformed", "negative"),
        (with_mask({"counts": [4096], "size": [64, 64]}), "mask-empty", "no pixel"),
        (with_mask({"counts": "P", "size": [64, 64]}), "mask-malformed", "cut short"),
        (with_mask({"counts": "é", "size": [64, 64]}), "mask-malformed", "cut short"),
        (with_mask({"counts": [0, 4096]}), "mask-malformed", "`size` is None"),
        (with_mask({"counts": 3, "size": [64, 64]}), "mask-malformed", "neither a text"),
        (with_mask(SMALL, (40, 40, 10, 10)), "mask-box", r"mask's own \[10, 10, 10, 10\]"),
    ],
)
def test_a_broken_object_is_named_with_the_reason(change, kind, why, world):
    edit(world, change)
    problems = check(read(world), decode=False).problems
    assert [(each.kind, each.record) for each in problems] == [(kind, "annotation 1")]
    assert problems[0].image.endswith("000000.jpg")
    assert re.search(why, problems[0].why)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: first(c).update(image_id=99), ("image-unknown", "annotation 1")),
        (lambda c: first(c).update(category_id=99), ("category-unknown", "annotation 1")),
        (lambda c: first(c).update(category_id=[9]), ("incomplete", "annotations[0]")),
        (lambda c: first(c).pop("image_id"), ("incomplete", "annotations[0]")),
        (lambda c: first(c).pop("bbox"), ("incomplete", "annotations[0]")),
        (lambda c: first(c).update(ignore=1), ("ignore-set", "annotation 1")),
        (lambda c: first(c).pop("area"), ("field-assumed", "annotation 1")),
        (lambda c: first(c).pop("iscrowd"), ("field-assumed", "annotation 1")),
        (lambda c: first(c).update(iscrowd=2), ("incomplete", "annotation 1")),
        (lambda c: c["images"][4].pop("height"), ("incomplete", "images[4]")),
        (lambda c: c["images"][4].update(height=0), ("incomplete", "image 5")),
        (lambda c: c["images"][4].update(file_name=None), ("incomplete", "image 5")),
        (lambda c: c["categories"].append({"id": 3, "name": "new"}), ("id-repeated", "category 3")),
        (
            lambda c: c["categories"].append({"id": 30, "name": "circle"}),
            ("category-repeated", "category 30"),
        ),
        (lambda c: c["images"].append(c["images"][0]), ("id-repeated", "image 1")),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 77}),
            ("file-repeated", "image 77"),
        ),
        (
            lambda c: c["annotations"].append({**first(c), "id": 777}),
            ("object-repeated", "annotation 777"),
        ),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 7, "file_name": "absent.jpg"}),
            ("image-missing", "image 7"),
        ),
        (lambda c: c["images"][2].update(width=65), ("image-size", "image 3")),
    ],
)
def test_a_broken_record_is_named(change, expected, world):
    edit(world, change)
    assert expected in found(world)
    assert len(set(found(world))) == 1


def test_an_image_folder_that_is_missing_is_named_and_not_its_images(world):
    shutil.rmtree(world / "images/train")
    (problem,) = check(read(world)).problems
    assert (problem.kind, problem.record) == ("image-missing", "image folder")
    assert problem.why == f"{world}/images/train is not there, and so are not 5 images"


def test_an_object_there_three_times_names_the_first_of_them(world):
    def repeat(content):
        content["annotations"] += [{**first(content), "id": number} for number in (500, 501)]

    edit(world, repeat)
    problems = check(read(world), decode=False).problems
    assert [(each.record, each.why) for each in problems] == [
        ("annotation 500", "as annotation 1"),
        ("annotation 501", "as annotation 1"),
    ]


def test_damaged_images_are_named_with_the_decoders_reason(world):
    image = world / "images/train/000001.jpg"
    image.write_bytes(image.read_bytes()[:400])
    (world / "images/train/000002.jpg").write_bytes(b"")
    problems = check(read(world), workers=2).problems
    assert [(each.kind, each.record) for each in problems] == [
        ("image-damaged", "image 2"),
        ("image-damaged", "image 3"),
    ]
    assert "truncated" in problems[0].why.lower()
    assert "no image" in problems[1].why


def test_an_image_under_two_names_is_named_also_when_it_was_saved_anew_without_loss(world):
    folder = world / "images/train"
    (folder / "000001.jpg").write_bytes((folder / "000000.jpg").read_bytes())
    with Image.open(folder / "000000.jpg") as image:
        image.save(folder / "new.png")
    edit(world, lambda c: c["images"][3].update(file_name="new.png"))
    assert found(world) == [("content-repeated", "image 2"), ("content-repeated", "image 4")]


def test_blank_images_of_other_sizes_are_not_the_same(world):
    for name, side in (("000000", (32, 64)), ("000001", (64, 32))):
        Image.new("RGB", side).save(world / f"images/train/{name}.jpg")
    assert {kind for kind, _ in found(world)} == {"image-size"}


def test_a_photograph_turned_by_its_exif_data_counts_as_turned(world):
    path = world / "images/train/000000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (64, 32), "red").save(path, exif=exif)
    edit(world, lambda c: c["images"][0].update(width=32, height=64))
    edit(world, lambda c: c.update(annotations=[]))
    assert found(world) == []
    edit(world, lambda c: c["images"][0].update(width=64, height=32))
    (problem,) = check(read(world)).problems
    assert "it is 32x64, recorded as 64x32; turned by its EXIF data" in problem.why


def test_a_sample_of_the_images_is_decoded_and_the_seed_draws_it(sound):
    samples = [set(check(read(sound), sample=3, seed=seed).decoded) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 3
    assert check(read(sound), decode=False).decoded == {}


def test_several_processes_find_what_one_finds(sound):
    assert check(read(sound), workers=2).decoded == check(read(sound), workers=1).decoded


def test_boxes_without_any_mask_are_a_sound_data_set_and_mixed_kinds_of_masks_too(world):
    edit(world, lambda c: first(c).update(segmentation=RLE, bbox=[0, 0, 64, 64]))
    assert found(world) == []
    edit(world, lambda c: [item.pop("segmentation") for item in c["annotations"]])
    assert found(world) == []


def test_compressed_masks_and_crowds_are_read(world):
    painted = np.zeros((64, 64), np.uint8)
    painted[5:40, 10:50] = 1
    painted[20, 20] = 0
    rle = coco_mask.encode(np.asfortranarray(painted))
    mask = {"size": [64, 64], "counts": rle["counts"].decode()}
    edit(world, lambda c: first(c).update(segmentation=mask, bbox=[10, 5, 40, 35], iscrowd=1))
    assert found(world) == []
    assert summary(check(read(world), decode=False))["crowd"] == 1


def test_counts_are_those_of_the_file(world):
    edit(world, lambda c: c["images"].append({**c["images"][0], "id": 9, "file_name": "new.jpg"}))
    Image.new("RGB", (64, 64)).save(world / "images/train/new.jpg")
    content = json.loads((world / "annotations/instances_train.json").read_text())
    facts = summary(check(read(world)))
    assert (facts["images"], facts["images_without_objects"]) == (6, 1)
    assert facts["objects"] == len(content["annotations"])
    for entry in facts["classes"]:
        objects = [a for a in content["annotations"] if a["category_id"] == entry["id"]]
        assert entry["instances"] == len(objects)
        assert entry["images"] == len({item["image_id"] for item in objects})
    assert facts["masks"]["polygons"] == len(content["annotations"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda c: c["images"][0]["neg_category_ids"].append(first(c)["category_id"]),
            ("contradiction", "image 1"),
        ),
        (
            lambda c: c["images"][0]["not_exhaustive_category_ids"].append(99),
            ("verified-unknown", "image 1"),
        ),
        (lambda c: c["images"][0].pop("neg_category_ids"), ("not-evaluable", "image 1")),
        (lambda c: c["categories"][0].pop("frequency"), ("not-evaluable", "category 1 (circle)")),
        (lambda c: c["images"][0].update(neg_category_ids=7), ("incomplete", "image 1")),
    ],
)
def test_what_lvis_adds_is_checked(change, expected, world):
    edit(world, change, "lvis")
    assert found(world, "lvis") == [expected]


def test_voc_files_that_are_missing_or_broken_are_named(world):
    folder = world / "VOC/Annotations"
    (folder / "train_000000.xml").unlink()
    (folder / "train_000001.xml").write_text("<annotation>")
    path = folder / "train_000002.xml"
    path.write_text(path.read_text().replace("<width>64", "<width>wide"))
    path = folder / "train_000003.xml"
    path.write_text(path.read_text().replace("<xmin>", "<xmin>x", 1))
    with open(world / "VOC/ImageSets/Main/train.txt", "a") as file:
        file.write("train_000004\nunknown\n")
    assert found(world, "voc") == [
        ("id-repeated", "image train_000004"),
        ("unreadable", "train_000000.xml"),
        ("unreadable", "train_000001.xml"),
        ("incomplete", "train_000002.xml"),
        ("box-malformed", "train_000003.xml, object 1"),
        ("unreadable", "unknown.xml"),
        ("image-missing", "image unknown"),
    ]


def test_voc_classes_that_are_given_are_the_only_ones(world):
    voc = world / "VOC"
    table = read_voc_folder(str(voc), "train", "train", ["circle", "star"])
    assert table.categories == {0: "circle", 1: "star"}
    unknown = check(table, decode=False).by_kind()["category-unknown"]
    assert len(unknown) == (table.category_of < 0).sum() > 0
    assert "the classes are circle, star" in unknown[0].why
    checked = check(read_voc_folder(str(voc), "train", "train", ["circle", "star"], chosen=True))
    assert checked.sound
    assert len(checked.by_kind()["class-left-out"]) == len(unknown)


def leaking(world, decode=True, **sample):
    train, val = (check(read(world, split=split), decode, **sample) for split in ("train", "val"))
    return [(each.kind, each.record, each.why) for each in leaks(train, val)]


def test_sets_that_count_their_images_from_one_share_names_and_ids_but_no_image(sound):
    assert leaking(sound) == []


def test_names_alone_are_a_note_where_the_pixels_were_not_compared(sound):
    found = leaking(sound, decode=False)
    assert [kind for kind, _, _ in found] == ["leak-name"] * 4
    assert not KINDS["leak-name"].serious
    assert 0 < len(leaking(sound, sample=3, seed=1)) < 4


def test_a_copy_under_another_name_is_found_by_its_pixels(world):
    shutil.copy(world / "images/train/000004.jpg", world / "images/val/000001.jpg")
    ((kind, record, why),) = leaking(world)
    assert (kind, record) == ("leak-content", "image 2")
    assert why.startswith("in train: image 5, ")
    assert why.endswith("images/train/000004.jpg")
    assert KINDS[kind].serious


@pytest.mark.parametrize("decode", [True, False])
def test_the_same_file_is_found_without_decoding_and_through_linked_folders(decode, world):
    shutil.rmtree(world / "images/val")
    (world / "images/val").symlink_to(world / "images/train")
    found = leaking(world, decode)
    assert [kind for kind, _, _ in found] == ["leak-file"] * 4


def test_an_image_that_cannot_be_decoded_is_no_leak(world):
    for split in ("train", "val"):
        (world / f"images/{split}/000000.jpg").write_bytes(b"")
    edit(world, lambda content: content["images"][0].update(file_name="000000.jpg"))
    assert [kind for kind, _, _ in leaking(world)] == ["leak-name"]


@pytest.mark.parametrize(
    ("kind", "parts", "problems"),
    [
        ("coco", ("instances_train2017.json", "train2017"), {}),
        ("coco", ("instances_val2017.json", "val2017"), {}),
        ("coco", ("person_val.json", "val2017"), {}),
        # of zero height, as in COCO's own file
        ("coco", ("boxes_train.json", "val2017"), {"box-empty": ["annotation 1000015595"]}),
        # three photographs whose boxes were not turned with them
        ("lvis", ("lvis_v0.5_val.json", ""), {"mask-box": 13}),
    ],
)
def test_real_annotations_are_sound_but_for_what_is_known(kind, parts, problems, real_data):
    coco = real_data / "coco"
    table = read_annotations((kind, str(coco / "annotations" / parts[0]), str(coco / parts[1])), "")
    groups = check(table, sample=20).by_kind()
    assert groups.keys() == problems.keys()
    for name, expected in problems.items():
        records = [each.record for each in groups[name]]
        assert records == expected or len(records) == expected


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_the_real_voc_folder_is_sound(split, real_data):
    table = read_annotations(("voc", str(real_data / "VOC2007"), split), split)
    assert check(table, sample=20).problems == []
    assert table.difficult.any()
