"""What is drawn is there to be seen: colours, dashes, labels that do not hide each other."""

import numpy as np
import pytest
from PIL import ImageColor

from virtex_d2.studies.viewer.drawing import COLORS, _place, draw_instances, instance_color
from virtex_d2.studies.viewer.matching import Instance

GREY = np.full((100, 160, 3), 128, np.uint8)
NAMES = {1: "star", 2: "a ring"}
SQUARE = [[20, 40, 70, 40, 70, 90, 20, 90]]


def draw(*items, image=GREY, **options):
    return draw_instances(image, items, NAMES, **options)


def has(drawn, color):
    return (drawn == np.array(ImageColor.getrgb(color))).all(axis=2)


def test_the_image_itself_is_left_as_it_is():
    before = GREY.copy()
    drawn = draw(Instance(1, (20, 40, 70, 90), SQUARE))
    assert (GREY == before).all()
    assert drawn.shape == GREY.shape
    assert drawn.dtype == np.uint8
    assert (draw() == GREY).all()


@pytest.mark.parametrize("verdict", [v for v in COLORS if v])
def test_a_verdict_has_its_colour(verdict):
    drawn = draw(Instance(1, (20, 40, 70, 90), verdict=verdict), labels=False)
    assert has(drawn, COLORS[verdict]).sum() > 20


def test_classes_have_colours_of_their_own_that_white_can_be_read_on():
    colors = [instance_color(Instance(n, (0, 0, 1, 1)), n) for n in range(200)]
    assert len(set(colors[:80])) == 80
    assert all(np.dot(c, (0.2126, 0.7152, 0.0722)) <= 0.41 * 255 for c in colors)


def test_missed_objects_are_dashed_and_right_ones_are_not():
    def share(verdict):
        drawn = draw(Instance(1, (20, 40, 120, 90), verdict=verdict), labels=False)
        return has(drawn, COLORS[verdict])[40, 25:115].mean()

    assert share("right") > 0.9
    assert 0.2 < share("missed") < 0.8


def test_masks_fill_what_they_cover_and_nothing_else():
    drawn = draw(Instance(1, (20, 40, 70, 90), SQUARE), boxes=False, labels=False)
    changed = (drawn != GREY).any(axis=2)
    assert changed[45:85, 25:65].all()
    assert not changed[:35].any()
    assert not changed[:, 76:].any()


def test_a_small_image_is_drawn_larger_with_everything_in_its_place():
    drawn = draw(Instance(1, (20, 40, 70, 90), SQUARE), side=640, labels=False)
    assert drawn.shape == (400, 640, 3)
    changed = (drawn != 128).any(axis=2)
    ys, xs = np.nonzero(changed)
    assert abs(xs.min() - 80) < 6
    assert abs(xs.max() - 280) < 6
    assert abs(ys.min() - 160) < 6
    assert abs(ys.max() - 360) < 6


def test_labels_stay_within_the_picture_and_hide_no_other():
    rng = np.random.default_rng(0)
    placed = []
    for _ in range(200):
        x, y = rng.uniform(-20, 140, 2)
        place = _place((x, y, x + 30, y + 20), (40, 15), (160, 120), placed)
        if place:
            placed.append(place)
    assert 10 < len(placed) < 30
    for n, (x0, y0, x1, y1) in enumerate(placed):
        assert x0 >= 0
        assert y0 >= 0
        assert x1 < 160
        assert y1 < 120
        assert not any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in placed[n + 1 :])


@pytest.mark.parametrize(
    "box", [(-1e300, 5, 1e300, 20), (5, 5, 5, 5), (50, 50, 10, 10), (500, 500, 600, 600)]
)
def test_boxes_that_cannot_be_are_drawn_without_an_error(box):
    for verdict in ("", "missed"):
        assert draw(Instance(9, box, verdict=verdict, score=0.5)).shape == GREY.shape


def test_run_length_masks_are_drawn_like_polygons():
    painted = np.zeros((100, 160), int)
    painted[40:90, 20:70] = 1
    flat = painted.T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    rle = {"counts": counts, "size": [100, 160]}
    one, other = (draw(Instance(1, (20, 40, 70, 90), mask)) for mask in (SQUARE, rle))
    assert (one != other).any(axis=2).mean() < 0.03
