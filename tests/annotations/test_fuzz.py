"""Whatever stands in a file is read or named; numpy's shortcuts find what plain code does."""

import copy
import json
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tests.annotations.conftest import read, words
from virtex_d2.annotations.checks import check
from virtex_d2.annotations.masks import mask_fault, run_lengths
from virtex_d2.studies.check_dataset.page import page, summary
from virtex_d2.studies.viewer.drawing import draw_instances
from virtex_d2.studies.viewer.matching import objects

_SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(1e300),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
_FIELDS = {
    "images": ("id", "file_name", "height", "width", "neg_category_ids", "coco_url"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd"),
    "categories": ("id", "name"),
}


@given(
    kind=st.sampled_from(["coco", "lvis"]),
    changes=st.lists(
        st.tuples(st.sampled_from(sorted(_FIELDS)), st.integers(0, 20), st.integers(0, 5), _VALUES),
        max_size=4,
    ),
)
@example(kind="coco", changes=[("categories", 1, 1, 0)])  # a name that is a number, like any id
@_SETTINGS
def test_no_content_of_a_field_ends_the_check(kind, changes, sound, tmp_path):
    content = copy.deepcopy(json.loads(Path(words(sound, kind)[1]).read_text()))
    for part, record, field, value in changes:
        record = content[part][record % len(content[part])]
        record[_FIELDS[part][field % len(_FIELDS[part])]] = value
    (tmp_path / "annotations").mkdir(exist_ok=True)
    name = "lvis_v1" if kind == "lvis" else "instances"
    (tmp_path / f"annotations/{name}_train.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir(exist_ok=True)
    checked = check(read(tmp_path, kind))
    assert json.dumps(summary(checked))
    assert page(checked)
    blank = np.zeros((64, 64, 3), np.uint8)
    for rows in checked.table.objects_by_image():
        draw_instances(blank, objects(checked.table, rows, (64, 64)), checked.table.categories)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
@_SETTINGS
def test_run_lengths_are_those_of_pycocotools(height, width, seed, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    runs, size = run_lengths({"counts": text, "size": [height, width]})
    assert size == (height, width)
    values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    assert (values == mask).all()
    plain = run_lengths({"counts": runs.tolist(), "size": [height, width]})[0]
    assert (plain == runs).all()


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
@_SETTINGS
def test_what_is_found_sound_is_what_pycocotools_decodes(text):
    mask = {"counts": text, "size": [6, 5]}
    if not mask_fault(mask, (6, 5)):
        runs, _ = run_lengths(mask)
        assert coco_mask.area(mask) == runs[1::2].sum()
