"""From the truth and a results file to a page that a browser shows without a network."""

import re

import pytest
from PIL import Image

from tests.browser import open_page
from virtex_d2.annotations.voc import read_voc_folder
from virtex_d2.detection.sources import read_annotations
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes.write import write_dataset
from virtex_d2.studies.viewer.gallery import picture
from virtex_d2.studies.viewer.gallery import show as show_table
from virtex_d2.studies.viewer.main import ORDERS, parse_args
from virtex_d2.studies.viewer.matching import arrange, judge
from virtex_d2.studies.viewer.results import read_results


@pytest.fixture
def show(table, words, tmp_path):
    """`show(file, ..., *flags, table=table, output="out")` -> the page, in a new folder."""

    def to_page(*arguments, table=table, output="out"):
        names = ["--truth", *words, "--output", tmp_path / output, "--num-images", 1]
        return show_table(table, parse_args([*map(str, [*names, "--predictions", *arguments])]))

    return to_page


def damaged(records):
    """One image without predictions, one with wrong ones, the others right."""
    kept = [dict(record) for record in records if record["image_id"] != 4]
    for record in kept:
        if record["image_id"] == 2:
            record["category_id"] = record["category_id"] % 14 + 1
    return kept


def test_the_truth_as_predictions_is_all_right(show, perfect, write, capsys):
    show(write(perfect))
    out = capsys.readouterr().out
    assert f"{len(perfect)} right, 0 wrong, 0 missed on 6 images" in out
    assert "IoU of masks" in out


def test_the_page_opens_in_a_browser_without_a_network(show, perfect, write, tmp_path):
    page = open_page(show(write(damaged(perfect)), "--num-images", 3))
    assert page.errors == []
    assert page.requests == []
    assert len(page.images) == 3
    assert all(image.loaded and image.width > 1000 for image in page.images)
    assert all(image.alt.startswith("image ") for image in page.images)
    assert "3 of 6 images shown" in page.text
    assert "missed object" in page.text
    pictures = sorted((tmp_path / "out/pictures").iterdir())
    assert len(pictures) == 3
    for path in pictures:
        with Image.open(path) as image:
            assert image.width > 1000


def order_of(page):
    return [int(number) for number in re.findall(r"<figcaption>image (\d+)", page.read_text())]


def test_images_come_in_the_order_that_is_asked_for(table, perfect, write):
    judged = judge(table, {"a": read_results(write(damaged(perfect)), table, 0.5)})
    orders = {order: [image.index + 1 for image in arrange(judged, order)] for order in ORDERS}
    assert orders["file"] == [1, 2, 3, 4, 5, 6]
    assert orders["wrong"][0] == 2
    assert set(orders["missed"][:2]) == set(orders["errors"][:2]) == {2, 4}
    assert set(orders["right"][-2:]) == {2, 4}
    assert sorted(orders["random"]) == orders["file"] != orders["random"]


def test_only_the_classes_that_are_asked_for_are_judged(show, table, perfect, write, capsys):
    number = int(table.category_of[0])
    name = list(table.categories.values())[number]
    show(write(perfect), "--classes", name)
    count = int((table.category_of == number).sum())
    assert f"{count} right, 0 wrong, 0 missed" in capsys.readouterr().out


def test_several_detectors_stand_side_by_side(show, perfect, write):
    page = show(
        f"first={write(perfect, 'a.json')}",
        f"second={write(damaged(perfect), 'b.json')}",
        "--num-images",
        2,
    )
    text = page.read_text()
    assert "first, all images" in text
    assert "second, all images" in text
    assert re.search(r"image 4, .*first: \d right, 0 wrong, 0 missed; second: 0 right", text)


def test_no_predictions_at_all_miss_everything(show, perfect, write, capsys):
    assert show(write([])).is_file()
    out = capsys.readouterr().out
    assert f"0 right, 0 wrong, {len(perfect)} missed" in out
    assert "no prediction on 6 of 6 images, at that score" in out


def test_a_page_of_boxes_alone_is_matched_by_boxes(show, perfect, write, capsys):
    for record in perfect:
        del record["segmentation"]
    path = write(perfect)
    show(path)
    assert "IoU of boxes" in capsys.readouterr().out
    with pytest.raises(InputError, match="have no mask that can be read; match them with --by bb"):
        show(path, "--by", "segm", output="other")


@pytest.mark.parametrize("kind", ["lvis", "voc"])
def test_other_formats_are_shown_too(kind, show, tmp_path, write, capsys):
    write_dataset(tmp_path / "w", "train", 3, 64, 1, formats=("coco", "lvis", "voc"))
    words = {
        "lvis": (
            "lvis",
            str(tmp_path / "w/annotations/lvis_v1_train.json"),
            str(tmp_path / "w/images"),
        ),
        "voc": ("voc", str(tmp_path / "w/VOC"), "train"),
    }[kind]
    table = read_annotations(words, "train")
    ids = list(table.categories)
    records = [
        {
            "image_id": table.image_ids[image],
            "category_id": ids[category],
            "bbox": box.tolist(),
            "score": 0.8,
        }
        for image, category, box in zip(table.image_of, table.category_of, table.boxes)
    ]
    show(write(records), table=table)
    assert f"{len(records)} right, 0 wrong, 0 missed" in capsys.readouterr().out


def test_objects_of_classes_that_are_left_out_are_not_missed(show, tmp_path, write, capsys):
    write_dataset(tmp_path / "w", "train", 6, 64, 1, formats=("voc",))
    table = read_voc_folder(str(tmp_path / "w/VOC"), "train", "train", ["star", "ring"], True)
    assert 0 < (table.category_of >= 0).sum() < len(table.records)
    show(write([]), table=table)
    count = int((table.category_of >= 0).sum())
    assert f"0 right, 0 wrong, {count} missed" in capsys.readouterr().out


def test_an_image_that_is_missing_or_of_another_size_is_named_and_the_next_one_drawn(
    show, world, perfect, write, tmp_path, capsys
):
    path = write(perfect)
    Image.new("RGB", (32, 64)).save(world / "images/train/000002.jpg")
    (world / "images/train/000001.jpg").unlink()
    page = show(path, "--sort", "file", "--num-images", 3)
    assert order_of(page) == [1, 4, 5]
    assert len(list((tmp_path / "out/pictures").iterdir())) == 3
    text, out = page.read_text(), capsys.readouterr().out
    for reason in ("000002.jpg: it is 32x64, recorded as 64x64", "000001.jpg: cannot read this"):
        assert reason in text
        assert reason in out
    assert f"3 images: {page}" in out


def test_where_no_image_can_be_drawn_nothing_is_left(show, world, perfect, write, tmp_path):
    path = write(perfect)
    for image in (world / "images/train").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"none of 6 images can be drawn; the first: .*000000.jpg"):
        show(path, "--sort", "file")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("detectors", [1, 2, 3, 4, 5])
def test_no_panel_stands_alone_where_rows_can_be_full(table, detectors):
    nothing = [[] for _ in table.image_ids]
    [judged] = judge(table, {str(n): nothing for n in range(detectors)}, images=[0])
    width, height = picture(table, judged).size
    rows = {1: 1, 2: 1, 3: 2, 4: 3, 5: 2}[detectors]
    side = 1040 // (3 if detectors in (2, 5) else 2)  # the images are square
    assert abs(height - rows * (side + 30)) < 12
    assert 1040 < width < 1100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--score-threshold", "nan"), "--score-threshold nan: expected a number from 0 to 1"),
        (("--iou", "2"), "--iou 2.0: expected a number"),
        (("--num-images", "0"), "--num-images 0: expected at least 1"),
        (("--sample", "-1"), "--sample -1"),
        (("--classes", "starr"), "no such class. Did you mean 'star'"),
    ],
)
def test_options_out_of_their_range_are_named(options, message, show, perfect, write):
    with pytest.raises(InputError, match=message):
        show(write(perfect), *options)


def test_a_folder_that_holds_something_is_left_alone(show, perfect, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="it is there already"):
        show(write(perfect))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_name_that_is_there_twice_is_refused(show, perfect, write):
    path = write(perfect)
    with pytest.raises(InputError, match="the name 'a' is empty or there twice"):
        show(f"a={path}", f"a={path}")
