"""The whole check: its page, files and exit code."""

import csv
import json

import pytest
from PIL import Image

from tests.annotations.conftest import edit, read, words
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.check_dataset.main import main

pytestmark = pytest.mark.usefixtures("catalog_as_before")


def checked(world, *options, kind="coco", splits=("train", "val")):
    sets = [word for split in splits for word in (f"--{split}", *words(world, kind, split))]
    return main("", [*sets, "--workers", "1", *map(str, options)])


@pytest.mark.parametrize("kind", ["coco", "lvis", "voc"])
def test_the_page_has_the_counts_and_ends_well(kind, sound, capsys):
    assert checked(sound, kind=kind) == 0
    out = capsys.readouterr().out
    objects = len(read(sound, kind).records)
    assert f"  objects  {objects:>11}   0 crowd, 0 difficult" in out
    assert "  images             5   0 without objects" in out
    assert out.count("no problems") == 2
    assert "compared by file and by content" in out
    assert all(len(line) <= 100 for line in out.splitlines() if "/" not in line)


def test_five_records_of_a_kind_are_named_and_all_are_counted_and_written(world, tmp_path, capsys):
    def break_eight(content):
        for item in content["annotations"][:8]:
            item["bbox"][2] = 0
        content["annotations"][8]["image_id"] = 99

    edit(world, break_eight)
    for name in ("all.json", "all.csv"):
        assert checked(world, "--output", tmp_path / name) == 1
    out = capsys.readouterr().out
    assert "problems (9)" in out
    assert "  8  box of no width or height" in out
    assert "annotation 5 (" in out
    assert "annotation 6 (" not in out
    assert "and 3 more" in out
    (train, val) = json.loads((tmp_path / "all.json").read_text())["datasets"]
    assert train["problems"] == {"image-unknown": 1, "box-empty": 8}
    assert len(train["records"]) == 9
    assert val["records"] == []
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["record"] for row in rows[1:]] == [f"annotation {n}" for n in range(1, 9)]
    assert {row["kind"] for row in rows} == {"image-unknown", "box-empty"}


def test_many_classes_are_shown_by_how_often_they_occur(world, capsys):
    def many(content):
        content["categories"] += [{"id": n, "name": f"class {n}"} for n in range(100, 300)]

    edit(world, many)
    assert checked(world, splits=["train"]) == 0
    out = capsys.readouterr().out
    assert "classes by instances: 1 to 9: " in out
    assert "without an instance: " in out
    assert "class 100, class 101, " in out
    assert " more\n" in out


def test_notes_do_not_fail_the_check(world, capsys):
    edit(world, lambda content: content["annotations"][0].pop("area"))
    assert checked(world, "--no-images") == 0
    out = capsys.readouterr().out
    assert "notes (1)" in out
    assert "annotation 1 (000000.jpg): no area" in out
    assert "without --no-images also by content" in out


def test_contact_sheets_are_drawn_of_each_set_with_broken_objects_marked(world, tmp_path):
    red = []
    for name in ("sound", "broken"):
        checked(world, "--contact-sheet", tmp_path / f"{name}.png", "--sheet-images", 4)
        edit(world, lambda content: content["annotations"][0].update(bbox=[0, 0, 8, 64]))
        with Image.open(tmp_path / f"{name}-1.png") as image:
            assert image.width > 1800
            colors = {color: count for count, color in image.getcolors(1 << 24)}
            red.append(colors.get((0xD0, 0, 0), 0))
        assert (tmp_path / f"{name}-2.png").is_file()
    assert red[1] > red[0] + 100


@pytest.mark.parametrize("kind", ["lvis", "voc"])
def test_contact_sheets_of_other_formats_are_drawn(kind, sound, tmp_path):
    checked(sound, "--contact-sheet", tmp_path / "one.png", kind=kind, splits=["train"])
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 1800


def test_a_sheet_leaves_out_images_that_cannot_be_read(world, tmp_path):
    for index in range(4):
        (world / f"images/train/{index:06}.jpg").write_bytes(b"")
    assert checked(world, "--contact-sheet", tmp_path / "one.png", splits=["train"]) == 1
    with Image.open(tmp_path / "one.png") as image:
        assert image.width < 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "list.txt"], "--output list.txt: expected a name that ends in .json or .csv"),
        (["--sample", "-1"], "--sample -1: expected at least 0"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--sheet-images", "0"], "--sheet-images 0: expected at least 1"),
        (["--output", "/proc/none/list.csv"], "cannot be written"),
        (["--contact-sheet", "/proc/none/list.png"], "cannot be written"),
    ],
)
def test_options_out_of_their_range_are_named(options, message, sound):
    with pytest.raises(InputError, match=message):
        checked(sound, "--no-images", *options)
