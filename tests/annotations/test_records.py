"""One typed reading of annotations: lossless values train, all others are refused by record."""

import copy
import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tests.detection.detections import evaluate, nothing, perfect
from virtex_d2.annotations.checks import check
from virtex_d2.annotations.records import read_records, read_sound
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.evaluation import build_evaluator
from virtex_d2.detection.loader import build_train_loader
from virtex_d2.detection.sources import read_annotations
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("catalog_as_before")

KINDS = ("coco", "lvis")


@pytest.fixture(scope="module")
def contents(three_formats):
    """A content of each format: three images, polygons and one compressed run-length mask."""
    found = {}
    for kind, name in (("coco", "instances"), ("lvis", "lvis_v1")):
        content = json.loads((three_formats / f"annotations/{name}_train.json").read_text())
        images = content["images"][:3]
        ids = {image["id"] for image in images}
        objects = [item for item in content["annotations"] if item["image_id"] in ids]
        rle = coco_mask.frPyObjects(objects[1]["segmentation"], 64, 64)
        rle = coco_mask.merge(rle)
        objects[1]["segmentation"] = {"size": [64, 64], "counts": rle["counts"].decode()}
        objects[2]["segmentation"] = {"size": [64, 64], "counts": [0, 4096]}
        objects[2]["bbox"] = [0, 0, 64, 64]
        objects[0].update(iscrowd=0, area=9.5)
        found[kind] = {**content, "images": images, "annotations": objects}
    return found


@pytest.fixture
def train(three_formats, tmp_path):
    """`train(kind, content)` -> first batch and AP of perfect detections; or an InputError."""

    def run(kind, content, encoding="utf-8", evaluates=True):
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop("r", None)
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(content), encoding=encoding)
        cfg = get_virtex_cfg()
        folder = three_formats / ("images" if kind == "lvis" else "images/train")
        cfg.VIRTEX.DATASETS = [["r", kind, str(path), str(folder)]]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("r",)
        cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.DATALOADER.NUM_WORKERS = (64,), 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.OUTPUT_DIR = 2, str(tmp_path / "run")
        register_datasets(cfg)
        batch = next(iter(build_train_loader(cfg, seed=1)))
        evaluator = build_evaluator(cfg, "r")
        results = evaluate(evaluator, DatasetCatalog.get("r")) if evaluates else {}
        return batch, {task: metrics["AP"] for task, metrics in results.items()}

    return run


# Places in a record, nested ones too; what is not there is added.
PLACES = [
    *(
        ("images", (field,))
        for field in ("id", "file_name", "height", "width", "coco_url", "neg_category_ids")
    ),
    ("images", ("not_exhaustive_category_ids",)),
    ("images", ("neg_category_ids", 0)),
    *(
        ("annotations", (field,))
        for field in ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "area")
    ),
    *(("annotations", (field,)) for field in ("ignore", "keypoints")),
    ("annotations", ("bbox", 2)),
    ("annotations", ("segmentation", 0)),
    ("annotations", ("segmentation", 0, 3)),
    ("annotations", ("segmentation", "size")),
    ("annotations", ("segmentation", "size", 1)),
    ("annotations", ("segmentation", "counts")),
    ("annotations", ("segmentation", "counts", 0)),
    *(("categories", (field,)) for field in ("id", "name", "frequency")),
]
VALUES = [
    *(None, True, False, 0, 1, 7, -3, 1.0, 2.5, float("nan"), float("inf"), 1e300, 10**30),
    *("", "1", "x", [], [1], [[1, 2]], ["1"], {}, {"counts": "Z"}),
]


def _replace(content, part, index, path, value):
    """Whether there was such a place; keys of records are added."""
    records = content[part]
    *parents, last = path
    node = records[index % len(records)]
    try:
        for step in parents:
            node = node[step]
        if parents:
            node[last]
        node[last] = value
    except (KeyError, IndexError, TypeError):  # a polygon has no size
        return False
    return True


@given(
    kind=st.sampled_from(KINDS),
    place=st.sampled_from(PLACES),
    index=st.integers(0, 2),
    value=st.sampled_from(VALUES),
)
@example(kind="coco", place=("images", ("width",)), index=0, value="64")
@example(kind="lvis", place=("annotations", ("area",)), index=0, value="9")
@example(kind="coco", place=("annotations", ("segmentation", "counts")), index=1, value="garbage")
@example(kind="coco", place=("annotations", ("keypoints",)), index=0, value=["1", 2, 3])
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_trains_or_is_refused_by_record(
    contents, train, tmp_path, kind, place, index, value
):
    content = copy.deepcopy(contents[kind])
    part, path = place
    if not _replace(content, part, index, path, value):
        return
    try:
        train(kind, content, evaluates=False)
    except InputError as error:
        message = str(error)
        assert str(tmp_path / f"{kind}.json") in message
        assert "image" in message or "annotation" in message or "categor" in message
        assert "Traceback" not in message


def _floats(value):
    """Every whole number of a JSON value as 96.0."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if type(value) is int else value


def _nulls(content):
    """null for all that may be left out."""
    for item in content["annotations"]:
        item.update(area=None, iscrowd=None, keypoints=None, ignore=None)
    for image in content["images"]:
        image.update(license=None)
        if "coco_url" not in image:
            image.update(coco_url=None, neg_category_ids=None)
    return {**content, "info": None, "licenses": None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (_floats, "utf-8"),
        (_nulls, "utf-8"),
        (lambda content: content, "utf-8-sig"),
        (lambda content: _nulls(_floats(content)), "utf-8-sig"),
    ],
    ids=["floats", "nulls", "byte order mark", "all"],
)
def test_what_is_lossless_trains_to_the_same(kind, change, encoding, contents, train):
    plain, expected = train(kind, copy.deepcopy(contents[kind]))
    batch, found = train(kind, change(copy.deepcopy(contents[kind])), encoding)
    assert found == expected == {"bbox": 100, "segm": 100}
    for first, second in zip(plain, batch):
        assert (first["image"] == second["image"]).all()
        assert first["image_id"] == second["image_id"]
        assert (first["instances"].gt_masks.tensor == second["instances"].gt_masks.tensor).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_are_texts_throughout_train(kind, contents, train):
    content = copy.deepcopy(contents[kind])
    for part in ("images", "annotations", "categories"):
        for record in content[part]:
            for field in ("id", "image_id", "category_id"):
                if field in record:
                    record[field] = f"n{record[field]:03}"
            for field in ("neg_category_ids", "not_exhaustive_category_ids"):
                if field in record:
                    record[field] = [f"n{number:03}" for number in record[field]]
    assert train(kind, content)[1] == {"bbox": 100, "segm": 100}


def _first(content):
    return content["annotations"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(width="64"), 'image 1.*: has width "64", expected pixels'),
        (lambda c: c["images"][0].update(height=True), "image 1.*: has height true, expected"),
        (lambda c: c["images"][0].update(height=64.5), "image 1.*: has height 64.5, expected"),
        (
            lambda c: c["images"][0].update(id="1"),
            r'images\[0\] .*: has id "1", but most others are n',
        ),
        (
            lambda c: c["categories"][0].update(name=3),
            r"categories\[0\]: has name 3, expected a te",
        ),
        (lambda c: _first(c).update(area="9"), 'annotation 1.*: has area "9", expected a number'),
        (lambda c: _first(c).update(area=float("nan")), "annotation 1.*: has area NaN"),
        (
            lambda c: _first(c).update(iscrowd=False),
            "annotation 1.*: has iscrowd false, expected 0",
        ),
        (lambda c: _first(c).update(iscrowd=2), "annotation 1.*: has iscrowd 2"),
        (lambda c: _first(c).update(image_id="1"), r'annotation 1: image_id "1" is not in'),
        (lambda c: _first(c).update(category_id="3"), r'category_id "3" is not in .*has 1, 2'),
        (
            lambda c: _first(c).update(bbox=[1, 2, "3", 4]),
            r'annotation 1.*: has bbox \[1, 2, "3", 4',
        ),
        (
            lambda c: _first(c).update(bbox=[1, 2, True, 4]),
            r"annotation 1.*: has bbox \[1, 2, true",
        ),
        (lambda c: _first(c).update(bbox=None), r"annotation 1.*: has bbox null"),
        (lambda c: _first(c).update(keypoints="x"), 'annotation 1.*: has keypoints "x"'),
        (
            lambda c: _first(c).update(segmentation={"size": [64, 64], "counts": "no mask"}),
            "annotation 1 .*: its `counts` are cut short, or no text of COCO's",
        ),
        (
            lambda c: _first(c).update(segmentation=[[1, 2, 3, 4, 5, float("inf")]]),
            "annotation 1 .*: a polygon has a coordinate that is not finite",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_lossless_is_refused_and_the_check_finds_it_too(
    kind, change, message, contents, train, tmp_path
):
    content = copy.deepcopy(contents[kind])
    change(content)
    with pytest.raises(InputError, match=message):
        train(kind, content)
    table = read_annotations((kind, str(tmp_path / f"{kind}.json"), str(tmp_path)), "r")
    assert not check(table, decode=False).sound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(neg_category_ids="x"), 'neg_category_ids "x", expected a'),
        (
            lambda c: c["images"][0].update(neg_category_ids=["3"]),
            '"3" in neg_category_ids, expect',
        ),
        (
            lambda c: c["images"][0].update(not_exhaustive_category_ids=[True]),
            "image 1.*: has not_exh",
        ),
        (
            lambda c: c["images"][0].update(neg_category_ids=None),
            "image 1 .*: lacks neg_category_ids",
        ),
        (
            lambda c: c["categories"][0].update(frequency=["r"]),
            r'category 1 \(circle\): has frequency \["r"\]',
        ),
        (lambda c: c["images"][0].update(coco_url=3), "image 1.*: has coco_url 3, expected a text"),
    ],
)
def test_what_lvis_adds_is_typed_too(change, message, contents, train):
    content = copy.deepcopy(contents["lvis"])
    change(content)
    with pytest.raises(InputError, match=message):
        train("lvis", content)


def test_objects_whose_mask_is_none_are_left_out_where_a_share_is_allowed(contents, tmp_path):
    content = copy.deepcopy(contents["coco"])
    _first(content)["segmentation"] = [[1, 2, 3, 4]]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    count = len(content["annotations"])
    assert len(read_records("coco", str(path)).annotations) == count
    assert len(read_sound("coco", str(path))["annotations"]) == count - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [{}, {"annotations": None}])
def test_a_test_set_without_annotations_gets_predictions_and_no_ap(
    kind, left, contents, three_formats, tmp_path, caplog
):
    """As image_info_test-dev2017.json, whose truth only a server has."""
    content = {key: value for key, value in contents[kind].items() if key != "annotations"}
    for image in content["images"]:
        image.pop("neg_category_ids", None)
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({**content, **left}))
    cfg = get_virtex_cfg()
    folder = three_formats / ("images" if kind == "lvis" else "images/train")
    cfg.VIRTEX.DATASETS = [["t", kind, str(path), str(folder)]]
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("t",), str(tmp_path)
    (found,) = register_datasets(cfg, eval_only=True)
    assert "no annotations: predictions only, no AP" in found.size
    records = DatasetCatalog.get("t")
    object_of = {"bbox": [8, 8, 9, 9], "bbox_mode": 1, "category_id": 2, "iscrowd": 0}
    with caplog.at_level("INFO"):
        results = evaluate(
            build_evaluator(cfg, "t"),
            records,
            lambda record: perfect({**record, "annotations": [object_of]}),
        )
    assert not results
    assert "AP is skipped" in caplog.text
    (file,) = Path(tmp_path / "inference").glob("*_instances_results.json")
    assert [item["category_id"] for item in json.loads(file.read_text())] == [3, 3, 3]
    cfg.DATASETS.TRAIN = ("t",)
    with pytest.raises(InputError, match="nothing to learn"):
        register_datasets(cfg)
    assert not evaluate(build_evaluator(cfg, "t"), records, nothing)
