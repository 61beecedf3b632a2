import json

import pytest

from pretrain.methods.captioning.metrics import read_predictions, read_references
from virtex_d2.engine.errors import InputError

REFERENCES = {
    "images": [{"id": 7, "file_name": "val/a.jpg"}, {"id": 8, "file_name": "val/b.jpg"}],
    "annotations": [
        {"image_id": 8, "caption": "a dog"},
        {"image_id": 7, "caption": "a cat"},
        {"image_id": 8, "caption": "the dog"},
    ],
}


@pytest.fixture
def read(tmp_path):
    """`read(predictions, references)`: text, or what is written as JSON."""

    def read(predictions, references=REFERENCES):
        for name, content in (("predictions", predictions), ("references", references)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        captions, names = read_references(str(tmp_path / "references.json"))
        return captions, read_predictions(str(tmp_path / "predictions.json"), captions, names)

    return read


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.mark.parametrize(
    "predictions",
    [
        [{"image_id": 7, "caption": "one"}, {"image_id": 8, "caption": "two"}],
        lines({"image_id": 8, "caption": "two"}, {"image_id": 7, "caption": "one"}),
        lines(
            {"file": "/any/where/a.jpg", "caption": "one", "logprob": -1.0, "tokens": [4]},
            {"file": "b.jpg", "caption": "two"},
        ),
    ],
    ids=["COCO results", "lines with ids", "lines of caption_images.py"],
)
def test_each_form_of_predictions_is_matched_with_the_references(read, predictions):
    references, candidates = read(predictions)
    assert references == {8: ["a dog", "the dog"], 7: ["a cat"]}
    assert candidates == {8: ["two"], 7: ["one"]}
    assert list(candidates) == list(references)


ONE, TWO = {"image_id": 7, "caption": "one"}, {"image_id": 8, "caption": "two"}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([ONE], "1 images of the references have no caption: 8"),
        ([ONE, TWO, {"image_id": 9, "caption": "x"}], "1 image ids are not in the references: 9"),
        (
            [{"image_id": "7", "caption": "x"}],
            r'no caption: 8, 7; 1 .*: "7"\. "7" is not 7: one is a text',
        ),
        ([ONE, TWO, ONE], "entry 2: image 7 has a caption already"),
        ([{"image_id": 7}], "entry 0 has no `caption`"),
        (["text"], "entry 0 has no `caption`"),
        ([{"image_id": [], "caption": "x"}], "`image_id` \\[\\] is no number or text"),
        (
            lines(ONE, {"file": "c.jpg", "caption": "x"}),
            "line 2: no reference image is called 'c.j",
        ),
        (lines({"caption": "x"}), "line 1: no reference image is called ''"),
        (lines(ONE) + '{"image_id": 8,', "line 2 is not JSON"),
        ("[1, 2", "expected a JSON list"),
        ("", "2 images of the references have no caption"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_by_place_and_id(read, predictions, message):
    with pytest.raises(InputError, match=message):
        read(predictions)


def test_a_file_name_of_two_images_decides_nothing(read):
    references = json.loads(json.dumps(REFERENCES))
    references["images"][1]["file_name"] = "train/a.jpg"
    with pytest.raises(InputError, match="2 images of the references are called 'a.jpg'"):
        read(lines({"file": "a.jpg", "caption": "x"}), references)


@pytest.mark.parametrize(
    "references",
    [
        {"images": []},
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]},
        {"images": [], "annotations": [{"image_id": 1, "caption": 5}]},
        {"images": [], "annotations": [5]},
        {"images": [], "annotations": []},
        "[]",
    ],
)
def test_references_that_are_no_coco_captions_are_refused(read, references):
    with pytest.raises(InputError, match="references.json"):
        read([ONE], references)


def test_what_is_lossless_is_read(read):
    references = json.loads(json.dumps(REFERENCES))
    references["images"][0]["id"] = references["annotations"][1]["image_id"] = 7.0
    marked = "\ufeff" + json.dumps([{"image_id": 7.0, "caption": "one"}, TWO])
    assert read(marked, references)[1] == {8: ["two"], 7: ["one"]}
    by_name = lines({"image_id": None, "file": "a.jpg", "caption": "one\u2028"}, TWO)
    raw = by_name.replace("\\u2028", "\u2028")
    assert read(raw, references)[1] == {8: ["two"], 7: ["one\u2028"]}


@pytest.mark.parametrize("name", ["A.jpg", "a.png", "0a.jpg", "'a.jpg'"])
def test_names_that_nearly_match_are_named(read, name):
    with pytest.raises(InputError, match=r"There is 'a\.jpg': names must be the same"):
        read(lines({"file": name, "caption": "x"}))


@pytest.mark.parametrize("value", [None, True, 3.5, [], {}, ["a"]])
@pytest.mark.parametrize(
    "place", [("images", "id"), ("images", "file_name"), ("annotations", "image_id")]
)
def test_a_field_of_another_type_is_refused(read, place, value):
    references = json.loads(json.dumps(REFERENCES))
    references[place[0]][0][place[1]] = value
    with pytest.raises(InputError, match=r"references.json: expected COCO captions"):
        read([ONE, TWO], references)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.json"):
        read_predictions(str(tmp_path / "absent.json"), {}, {})
