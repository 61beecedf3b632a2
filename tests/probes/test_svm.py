"""Average precision against hand-computed values, and the protocol of the SVMs."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from virtex_d2.studies.probes.config import get_probe_cfg
from virtex_d2.studies.probes.svm import average_precision_11, evaluate_svms


def ranked(pattern: str) -> float:
    """AP of a ranking written from the surest image to the least sure, + for a positive."""
    positives = np.array([mark == "+" for mark in pattern])
    return average_precision_11(positives, -np.arange(len(pattern), dtype=float))


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        ("+++--", Fraction(1)),
        # recall 1/3 at precision 1, 2/3 at 2/3, 1 at 1/2: four, three and four levels
        ("+-+--+", (4 + 3 * Fraction(2, 3) + 4 * Fraction(1, 2)) / 11),
        # one positive, third: every level is reached there
        ("--+-", Fraction(1, 3)),
        # the precision of a later rank counts for earlier recalls if it is higher: 3/5 over 1/3
        ("--+++", Fraction(3, 5)),
        # three of ten positives are recall 0.3, although 3 * 0.1 > 0.3 in floating point
        ("+++-------+++++++", (4 + 7 * Fraction(10, 17)) / 11),
    ],
)
def test_the_eleven_point_average_precision_is_as_computed_by_hand(ranking, expected):
    assert ranked(ranking) == pytest.approx(float(expected), abs=1e-12)


def test_images_of_equal_score_are_ranked_together():
    for order in ("+-+-", "-+-+", "++--"):
        positives = np.array([mark == "+" for mark in order])
        assert average_precision_11(positives, np.ones(4)) == 0.5


def test_without_a_positive_there_is_no_average_precision():
    assert np.isnan(average_precision_11(np.zeros(3, bool), np.arange(3.0)))


def by_definition(positives: list[bool], scores: list[int]) -> Fraction:
    """Everingham et al.'s formula, threshold by threshold, in exact numbers."""
    points = []
    for threshold in sorted(set(scores)):
        chosen = [p for p, score in zip(positives, scores) if score >= threshold]
        right = sum(chosen)
        points.append((Fraction(right, sum(positives)), Fraction(right, len(chosen))))
    levels = [Fraction(level, 10) for level in range(11)]
    return sum(max(p for recall, p in points if recall >= level) for level in levels) / 11


RANKINGS = st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=1, max_size=30).filter(
    lambda images: any(positive for positive, _ in images)
)


@given(RANKINGS)
def test_the_average_precision_is_the_definitions(images):
    positives, scores = zip(*images)
    found = average_precision_11(np.array(positives), np.array(scores, float))
    assert found == pytest.approx(float(by_definition(positives, scores)), abs=1e-12)


@given(RANKINGS, st.randoms(use_true_random=False))
def test_it_depends_on_the_ranking_alone(images, random):
    positives, scores = map(np.array, zip(*images))
    expected = average_precision_11(positives, scores.astype(float))
    assert 0 < expected <= 1
    order = list(range(len(images)))
    random.shuffle(order)
    assert average_precision_11(positives[order], np.exp(scores[order] / 2)) == expected


@given(RANKINGS)
def test_a_positive_that_rises_to_the_top_does_not_lower_it(images):
    positives, scores = map(np.array, zip(*images))
    before = average_precision_11(positives, scores.astype(float))
    raised = scores.astype(float)
    raised[int(np.flatnonzero(positives)[0])] = 9.0
    assert average_precision_11(positives, raised) >= before - 1e-12


@pytest.fixture
def cfg():
    return get_probe_cfg()


def noisy_set(count: int, seed: int = 0):
    """Unit features and labels (count, 2): of a class that is easy to see, and of a hard one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 20))
    easy = x[:, 0] > 0.3
    hard = x[:, 1] + rng.normal(0, 3, count) > 1
    labels = np.where(np.stack([easy, hard], 1), 1, -1).astype(np.int8)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def test_each_class_has_the_cost_that_cross_validation_chooses(cfg):
    train, test = noisy_set(150), noisy_set(80, seed=1)
    results, left_out = evaluate_svms(cfg, ("easy", "hard"), train, test)
    assert not left_out
    for column, result in enumerate(results):
        search = GridSearchCV(
            LinearSVC(class_weight={1: 2, -1: 1}, loss="squared_hinge", max_iter=2000),
            {"C": [0.01, 0.1, 1.0, 10.0]},
            scoring="average_precision",
            cv=3,
        ).fit(train[0], train[1][:, column])
        assert result.cost == search.best_params_["C"]
        assert result.cross_validated == pytest.approx(search.best_score_, abs=1e-6)
        decisions = search.decision_function(test[0])
        expected = average_precision_11(test[1][:, column] == 1, decisions)
        assert result.AP11 == pytest.approx(expected, abs=1e-6)
    assert results[0].cost != results[1].cost, "one cost for all would pass"


def test_difficult_objects_count_neither_in_training_nor_in_the_test(cfg):
    train, test = noisy_set(120), noisy_set(60, seed=1)
    for labels in (train[1], test[1]):
        labels[::7, 0] = 0
    [before], _ = evaluate_svms(cfg, ("easy",), train, test)
    assert (before.train_ignored, before.test_ignored) == (18, 9)
    turned = [(x.copy(), labels) for x, labels in (train, test)]
    for x, _ in turned:
        x[::7] *= -1
    [after], _ = evaluate_svms(cfg, ("easy",), *turned)
    assert after == before


def test_difficult_objects_can_be_negatives_in_training_as_in_the_released_code(cfg):
    cfg.SVM.DIFFICULT = "negative"
    train, test = noisy_set(120), noisy_set(60, seed=1)
    train[1][::7, 0] = 0
    [result], _ = evaluate_svms(cfg, ("easy",), train, test)
    train[1][::7, 0] = -1
    [as_negatives], _ = evaluate_svms(cfg, ("easy",), train, test)
    assert result.AP11 == as_negatives.AP11
    assert result.train_positives == as_negatives.train_positives


def test_a_class_without_positives_is_left_out_with_its_reason(cfg):
    train, test = noisy_set(60), noisy_set(30, seed=1)
    names = ("easy", "untrained", "untested", "everywhere")
    few = np.full((60, 1), -1)
    few[:2] = 1
    train = train[0], np.hstack([train[1][:, :1], few, train[1][:, [0, 0]]])
    none = np.full((30, 1), -1)
    test = test[0], np.hstack([test[1][:, [0, 0]], none, -none])
    results, left_out = evaluate_svms(cfg, names, train, test)
    assert [result.name for result in results] == ["easy"]
    assert left_out == {
        "untrained": "2 positive training images, and 3 folds need as many",
        "untested": "no positive test image",
        "everywhere": "no negative test image",
    }


@pytest.mark.slow
def test_classes_in_processes_of_their_own_are_the_same(cfg):
    train, test = noisy_set(60), noisy_set(30, seed=1)
    alone = evaluate_svms(cfg, ("easy", "hard"), train, test)
    cfg.SVM.NUM_JOBS = 2
    assert evaluate_svms(cfg, ("easy", "hard"), train, test) == alone
