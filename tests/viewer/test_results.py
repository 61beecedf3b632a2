"""Results files: what is of another data set or broken is named, and nothing is drawn."""

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.viewer.results import read_results


def first(change):
    def apply(records):
        records[0].update(change)

    return apply


def test_predictions_are_sorted_to_their_images(table, perfect, write):
    perfect[0]["score"] = 0.4
    found = read_results(write(perfect), table, threshold=0.5)
    assert [len(each) for each in found] == [
        sum(r["image_id"] == key and r["score"] >= 0.5 for r in perfect) for key in table.image_ids
    ]
    x, y, width, height = perfect[-1]["bbox"]
    assert found[-1][-1].box == (x, y, x + width, y + height)


def test_no_predictions_and_none_for_an_image_are_no_error(table, perfect, write):
    assert read_results(write([]), table, 0.5) == [[]] * 6
    some = [record for record in perfect if record["image_id"] != 2]
    found = read_results(write(some), table, 0.5)
    assert found[1] == []
    assert found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first({"image_id": 99}), "predictions for 1 images that .*train.json lacks: image_id 99"),
        (first({"image_id": "1"}), "lacks: image_id '1'.*another data set"),
        (first({"category_id": 99}), "for 1 classes that .*: category_id 99"),
        (first({"score": float("nan")}), "record 0 has the score nan.*diverge"),
        (first({"score": None}), "record 0 has the score None"),
        (first({"bbox": [1, 2, 3]}), r"record 0 has the bbox \[1, 2, 3\]"),
        (first({"bbox": [1, 2, 3, float("inf")]}), "expected four finite"),
        (first({"image_id": [1]}), r"has the image_id \[1\]"),
        (lambda r: r[0].pop("score"), "record 0 lacks score"),
        (
            first({"segmentation": {"counts": [0, 6], "size": [2, 3]}}),
            "record 0, of image 1: .*size is 3x2, that of the image 64x64",
        ),
        (first({"segmentation": {"counts": "PP", "size": [64, 64]}}), "mask cannot be used"),
    ],
)
def test_a_broken_record_is_named(change, message, table, perfect, write):
    change(perfect)
    with pytest.raises(InputError, match=message) as caught:
        read_results(write(perfect), table, 0.5)
    assert "results.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [40, 2, 30, 9]}, r"record 0, of image 1: its bbox .* beyond the image of 64x64"),
        ({"bbox": [-5, 2, 30, 9]}, "reaches beyond"),
        ({"segmentation": {"counts": [96 * 96], "size": [96, 96]}}, "its size is 96x96"),
    ],
)
def test_predictions_of_other_images_are_found_below_the_threshold_too(
    change, message, table, perfect, write
):
    """Ids from 1 on are in every data set, and a poor detector's scores are all low."""
    perfect[0].update(change)
    for record in perfect:
        record["score"] = 0.01
    with pytest.raises(InputError, match=f"{message}.*of the same images"):
        read_results(write(perfect), table, 0.5)


def test_a_box_that_ends_a_rounded_pixel_beyond_the_image_is_none_of_another(table, perfect, write):
    perfect[0]["bbox"] = [-0.5, 0, 65, 64]
    assert read_results(write(perfect), table, 0.5)[0][0].box == (-0.5, 0, 64.5, 64)


def test_detectron2s_binary_predictions_are_told_from_its_json(table, tmp_path):
    path = tmp_path / "instances_predictions.pth"
    path.write_bytes(b"PK\x03\x04\0\0\xff")
    with pytest.raises(InputError, match="found a binary file.* Expected ..._instances_res"):
        read_results(str(path), table, 0.5)


def test_many_unknown_images_are_counted(table, perfect, write):
    for number, record in enumerate(perfect):
        record["image_id"] = 1000 + number
    with pytest.raises(InputError, match=f"{len(perfect)} images .* 1000, 1001, .* and .* more"):
        read_results(write(perfect), table, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "cut short"),
        ("{}", "found a dict. Expected ..._instances_results.json"),
        ("[1]", "record 0 is 1, expected an object with image_id"),
        ('{"iteration": 19}\n{"iteration": 39}\n', "Extra data.* Expected ..._instances"),
    ],
)
def test_a_file_that_holds_no_results_is_refused(text, message, table, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(str(tmp_path / "x.json"), table, 0.5)
