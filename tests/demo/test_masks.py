"""Predictions on held-out images, right and wrong."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.demo.masks import judge, load_pictures

RECORD = {"id": 1, "height": 40, "width": 50}
NAMES = {1: "star", 2: "ring"}


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def truth(category, *box):
    return {"image_id": 1, "category_id": category, "segmentation": polygon(*box)}


def predicted(category, score, *box):
    rle = coco_mask.merge(coco_mask.frPyObjects(polygon(*box), 40, 50))
    rle["counts"] = rle["counts"].decode()  # as COCOEvaluator writes it
    return {"image_id": 1, "category_id": category, "score": score, "segmentation": rle}


STAR, RING = truth(1, 5, 5, 15, 15), truth(2, 25, 5, 45, 25)


def judged(predictions, objects=(STAR, RING)):
    instances = judge(predictions, list(objects), RECORD, NAMES)
    return [(instance.name, instance.score, instance.right) for instance in instances]


def test_a_prediction_of_the_right_class_and_place_is_right():
    assert judged([predicted(1, 0.9, 6, 5, 16, 15)]) == [("star", 0.9, True)]


def test_a_prediction_of_another_class_is_wrong():
    assert judged([predicted(2, 0.9, 5, 5, 15, 15)]) == [("ring", 0.9, False)]


def test_a_prediction_that_overlaps_too_little_is_wrong():
    assert judged([predicted(1, 0.9, 10, 5, 20, 15)]) == [("star", 0.9, False)]


def test_an_object_found_twice_counts_once():
    twice = [predicted(1, 0.6, 5, 5, 15, 15), predicted(1, 0.8, 5, 5, 15, 15)]
    assert judged(twice) == [("star", 0.8, True), ("star", 0.6, False)]


def test_as_many_predictions_are_taken_as_there_are_objects():
    many = [predicted(1, score / 10, 5, 5, 15, 15) for score in range(9)]
    assert [score for _, score, _ in judged(many)] == [0.8, 0.7]
    assert judged([]) == []


@pytest.fixture
def world(tmp_path):
    images = [{**RECORD, "id": number, "file_name": f"{number}.png"} for number in (1, 2, 3)]
    for record in images:
        pixels = np.full((40, 50, 3), record["id"], np.uint8)
        Image.fromarray(pixels).save(tmp_path / record["file_name"])
    star, ring = {**STAR, "image_id": 2}, {**RING, "image_id": 3}
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    content = {"images": images, "annotations": [star, ring], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    found = [{**predicted(2, 0.7, 25, 5, 45, 25), "image_id": 3}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    return tmp_path


def test_pictures_are_the_first_with_an_object_and_carry_each_starts_predictions(world):
    pictures = load_pictures(world / "truth.json", world, {"random": world / "found.json"}, 5)
    assert [picture.file_name for picture in pictures] == ["2.png", "3.png"]
    first, second = pictures
    assert (first.image == 2).all()
    assert first.image.shape == (40, 50, 3)
    assert first.predictions["random"] == ()
    assert first.truth[0].mask.sum() == 100
    assert [each.right for each in second.predictions["random"]] == [True]
    assert second.predictions["random"][0].mask.sum() == 400


def test_only_as_many_pictures_are_read_as_asked_for(world):
    (world / "3.png").unlink()
    assert len(load_pictures(world / "truth.json", world, {}, 1)) == 1


def test_a_picture_that_is_missing_is_named(world):
    (world / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png: cannot read this image"):
        load_pictures(world / "truth.json", world, {}, 1)
