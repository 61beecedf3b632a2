"""Matching is COCO's own, object by object."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from virtex_d2.studies.viewer.matching import Instance, match

SIZE = (40, 50)


def box(x, y, width, height, category=1, **rest):
    return Instance(category, (x, y, x + width, y + height), **rest)


def verdicts(truth, predictions, **options):
    result = match(truth, predictions, SIZE, **options)
    return [each.verdict for each in result.truth], [each.verdict for each in result.predictions]


STAR, RING = box(5, 5, 10, 10), box(25, 5, 20, 20, category=2)


def test_the_right_class_at_the_right_place_is_right():
    assert verdicts([STAR, RING], [box(6, 5, 10, 10, score=0.9)]) == (
        ["found", "missed"],
        ["right"],
    )


def test_another_class_or_too_little_overlap_is_wrong():
    wrong = [box(5, 5, 10, 10, category=2, score=0.9), box(11, 5, 10, 10, score=0.8)]
    assert verdicts([STAR], wrong) == (["missed"], ["wrong", "wrong"])


def test_the_second_prediction_of_an_object_is_wrong_and_the_best_scored_comes_first():
    twice = [box(5, 5, 10, 10, score=0.6), box(6, 5, 10, 10, score=0.8)]
    result = match([STAR], twice, SIZE)
    assert [(each.score, each.verdict) for each in result.predictions] == [
        (0.8, "right"),
        (0.6, "wrong"),
    ]
    assert result.count("right") == result.count("wrong") == result.count("found") == 1


def test_a_higher_threshold_needs_more_overlap():
    near = [box(6, 5, 10, 10, score=0.9)]
    assert verdicts([STAR], near, threshold=0.9) == (["missed"], ["wrong"])


def test_difficult_objects_count_neither_way():
    difficult = box(5, 5, 10, 10, ignore=True)
    assert verdicts([difficult], [box(5, 5, 10, 10, score=0.9)]) == (["ignored"], ["ignored"])
    assert verdicts([difficult], []) == (["ignored"], [])


def test_a_crowd_takes_any_number_of_predictions_that_lie_in_it():
    crowd = box(0, 0, 40, 40, ignore=True, crowd=True)
    inside = [box(x, 5, 5, 5, score=0.5) for x in (1, 10, 20)]
    assert verdicts([crowd], inside)[1] == ["ignored"] * 3


def test_what_was_not_searched_for_is_not_held_against_a_prediction():
    both = [box(5, 5, 10, 10, score=0.9), box(30, 30, 5, 5, category=3, score=0.8)]
    assert verdicts([STAR], both, verified={1})[1] == ["right", "ignored"]
    assert verdicts([STAR], both, verified={1, 3})[1] == ["right", "wrong"]


def test_masks_are_matched_by_their_pixels():
    ring = {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]}
    half = {"segmentation": [[5, 5, 15, 5, 5, 15]]}
    truth, predictions = [box(5, 5, 10, 10, **ring)], [box(5, 5, 10, 10, score=1, **half)]
    assert verdicts(truth, predictions, threshold=0.7)[1] == ["right"]
    assert verdicts(truth, predictions, threshold=0.7, by="segm")[1] == ["wrong"]


_BOX = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2)


@given(
    st.lists(st.tuples(_BOX, st.integers(1, 2), st.booleans()), max_size=6),
    st.lists(st.tuples(_BOX, st.integers(1, 2)), max_size=8),
    st.sampled_from([0.3, 0.5, 0.75]),
)
@settings(max_examples=150)
def test_it_is_what_cocos_evaluation_matches(truth, predicted, threshold):
    annotations = [
        {
            "id": n,
            "image_id": 1,
            "category_id": c,
            "bbox": list(b),
            "area": b[2] * b[3],
            "iscrowd": int(crowd),
        }
        for n, (b, c, crowd) in enumerate(truth, start=1)
    ]
    scores = np.linspace(0.9, 0.1, len(predicted)).tolist()
    results = [
        {"image_id": 1, "category_id": c, "bbox": list(b), "score": s}
        for (b, c), s in zip(predicted, scores)
    ]
    expected = _coco_verdicts(annotations, results, threshold)
    result = match(
        [box(*b, category=c, ignore=crowd, crowd=crowd) for b, c, crowd in truth],
        [box(*b, category=c, score=s) for (b, c), s in zip(predicted, scores)],
        SIZE,
        threshold=threshold,
    )
    assert {each.score: each.verdict for each in result.predictions} == expected


def _coco_verdicts(annotations, results, threshold):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "height": SIZE[0], "width": SIZE[1]}],
        "annotations": annotations,
        "categories": [{"id": 1}, {"id": 2}],
    }
    truth.createIndex()
    if not results:
        return {}
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.params.iouThrs = np.array([threshold])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    verdicts = {}
    for each in filter(None, evaluation.evalImgs):
        for score, taken, ignored in zip(
            each["dtScores"], each["dtMatches"][0], each["dtIgnore"][0]
        ):
            verdicts[score] = "ignored" if ignored else "right" if taken else "wrong"
    return verdicts


def test_masks_need_masks():
    with pytest.raises(TypeError):
        match([STAR], [box(5, 5, 10, 10, score=1)], SIZE, by="segm")
