"""Data sets from the config, what is wrong with them, and fractions of them."""

import json
import logging
import random
import shutil
from itertools import pairwise

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from virtex_d2.annotations.usable import Use, require_usable
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets, register_fraction, take_fraction
from virtex_d2.detection.loader import TestLoader, build_train_loader
from virtex_d2.detection.sources import read_annotations
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("catalog_as_before")


@pytest.fixture
def world(shapes_world, tmp_path):
    """A copy of the small world, to be damaged."""
    shutil.copytree(shapes_world, tmp_path / "world")
    return tmp_path / "world"


def _file(world, split="train"):
    return world / "annotations" / f"instances_{split}.json"


def _edit(world, change, split="train"):
    content = json.loads(_file(world, split).read_text())
    change(content)
    _file(world, split).write_text(json.dumps(content))


def _config(world, train=("w_train",), test=("w_test",), **keys):
    cfg = get_virtex_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.VIRTEX.DATASETS = [
        [f"w_{split}", "coco", str(_file(world, split)), str(world / "images" / split)]
        for split in ("train", "test")
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    return cfg


def test_a_data_set_is_registered_with_its_classes_and_files(world):
    cfg = _config(world)
    train, test = register_datasets(cfg)
    records = DatasetCatalog.get("w_train")
    metadata = MetadataCatalog.get("w_train")
    assert len(records) == 6
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(_file(world))
    assert metadata.thing_classes == list(train.categories.values())
    assert train.categories == test.categories
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(metadata.thing_classes) >= 12


def test_the_same_data_set_may_be_registered_twice_but_not_another_of_its_name(world):
    register_datasets(_config(world))
    register_datasets(_config(world))
    cfg = _config(world)
    cfg.VIRTEX.DATASETS[0][3] = str(world)
    with pytest.raises(InputError, match="'w_train' is taken"):
        register_datasets(cfg)


def test_paths_may_hold_environment_variables(world, monkeypatch):
    monkeypatch.setenv("MY_DATA", str(world))
    cfg = _config(world)
    cfg.VIRTEX.DATASETS[0][2] = "$MY_DATA/annotations/instances_train.json"
    assert register_datasets(cfg)[0].source == str(_file(world))
    cfg.VIRTEX.DATASETS[0][2] = "$MY_OTHER_DATA/train.json"
    with pytest.raises(InputError, match="MY_OTHER_DATA"):
        register_datasets(cfg)


def test_detectron2s_data_folder_has_detectron2s_default(world, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    cfg = _config(world)
    cfg.VIRTEX.DATASETS[0][2] = "$DETECTRON2_DATASETS/none.json"
    with pytest.raises(InputError, match="^datasets/none.json: the annotations of .* not there"):
        register_datasets(cfg)


def test_detectron2s_own_names_need_no_entry_and_a_missing_file_names_the_variable(world):
    with pytest.raises(InputError, match=r"instances_val2017.json: .*DETECTRON2_DATASETS"):
        register_datasets(_config(world, test=("coco_2017_val",)))


def test_an_unknown_name_is_told_with_the_nearest(world):
    with pytest.raises(InputError, match="'w_trian' is not a known data set.*Did you mean 'w_tra"):
        register_datasets(_config(world, train=("w_trian",)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "expected entries"),
        (["a", "coco", "b.json"], "expected entries"),
        (["a", "coco", "b.json", 3], "expected entries"),
        (["a", "cocoo", "b.json", "c"], "has the type 'cocoo'.*Did you mean 'coco'"),
    ],
)
def test_a_malformed_entry_is_shown(entry, message, world):
    cfg = _config(world)
    cfg.VIRTEX.DATASETS = [entry]
    with pytest.raises(InputError, match=message):
        register_datasets(cfg)


def test_evaluation_alone_needs_no_training_data(world):
    _file(world, "train").unlink()
    assert [d.name for d in register_datasets(_config(world), eval_only=True)] == ["w_test"]


@pytest.mark.parametrize(("eval_only", "key"), [(False, "TRAIN"), (True, "TEST")])
def test_no_data_at_all_is_an_error(eval_only, key, world):
    with pytest.raises(InputError, match=f"DATASETS.{key} is empty"):
        register_datasets(_config(world, train=(), test=()), eval_only)


def test_a_number_of_classes_that_is_not_the_datas_is_refused_with_their_names(world):
    with pytest.raises(InputError, match="NUM_CLASSES is 80, but 'w_train'.*categories: .*circle"):
        register_datasets(_config(world, **{"MODEL.ROI_HEADS.NUM_CLASSES": 80}))


def test_training_and_test_sets_of_different_categories_are_refused(world):
    def rename(content):
        content["categories"][1]["name"] = "zebra"

    _edit(world, rename, "test")
    with pytest.raises(InputError, match=r"different categories: id 2 is '.*' and 'zebra'"):
        register_datasets(_config(world))


def test_a_training_set_without_annotations_is_refused(world):
    _edit(world, lambda content: content.update(annotations=[]))
    with pytest.raises(InputError, match="no annotation that is not a crowd"):
        register_datasets(_config(world))


def _check_file(path, images, **use):
    table = read_annotations(("coco", str(path), str(images)), "w")
    require_usable(table, Use(**use))
    return table


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.json: cannot be read: No such file"):
        _check_file(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "expected JSON, but it is cut short"),
        ("[]", "expected a JSON object, found a list"),
        ('{"images": []}', "expected a list of objects `categories`, found the keys .'images'."),
        ('{"images": 3, "annotations": [], "categories": []}', "objects `images`, found 3 in it"),
        ('{"images": [3], "annotations": [], "categories": []}', "a list of objects `images`"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\]: lacks file",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "`images` is empty"),
    ],
)
def test_a_file_that_is_no_coco_file_is_told_where(text, message, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        _check_file(path, tmp_path)
    assert str(path) in str(caught.value)


def _check(world, masks=True, tests=False, **use):
    return _check_file(_file(world), world / "images/train", masks=masks, tests=tests, **use)


def test_absent_images_are_counted_and_the_first_ten_named(world):
    def list_more(content):
        content["images"] += [
            {"id": 100 + n, "file_name": f"absent{n:02}.jpg", "height": 64, "width": 64}
            for n in range(12)
        ]

    _edit(world, list_more)
    with pytest.raises(
        InputError, match=r"image file missing \(12\): image 100 .*lists 18 images"
    ) as caught:
        _check(world)
    assert "absent09.jpg is not there and 2 more" in str(caught.value)
    assert "absent10" not in str(caught.value)


def _first(content):
    return content["annotations"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: _first(c).update(category_id=99), "category_id 99 is not in"),
        (lambda c: _first(c).update(image_id=99), "image_id 99 is not in"),
        (
            lambda c: _first(c).update(bbox=[5, 5, 0, 9]),
            r"annotation 1 \(000000.jpg\): bbox .5, 5, 0, 9.",
        ),
        (
            lambda c: _first(c).update(bbox=[60, 5, 9, 9]),
            "bbox .60, 5, 9, 9. reaches 5.0 px outside the 64x64 image",
        ),
        (lambda c: _first(c).update(bbox=[-3, 5, 9, 9]), "box outside its image .1.:"),
        (lambda c: _first(c).update(bbox=[1, 2, 3]), "bbox .1, 2, 3."),
        (
            lambda c: _first(c).update(bbox=[1, 2, 3, float("nan")]),
            "has bbox .1, 2, 3, NaN.",
        ),
        (lambda c: _first(c).pop("segmentation"), "object without a mask .1.: annotation 1 "),
        (lambda c: _first(c).update(segmentation={"counts": [], "size": [64, 64]}), "bitmask"),
        (lambda c: c["annotations"].append(_first(c)), "id there twice .1.: annotation 1: an"),
        (lambda c: c["images"].append(c["images"][0]), "id there twice .1.: image 1 "),
        (lambda c: _first(c).pop("bbox"), r"annotations\[0\] .*: lacks bbox"),
        (
            lambda c: _first(c).update(segmentation=[[1, 2, 3, 4]]),
            "a polygon has 4 numbers",
        ),
        (lambda c: _first(c).update(segmentation=[[1] * 9]), "a polygon has 9 numbers"),
        (lambda c: _first(c).update(segmentation=[[]]), "a polygon has 0 numbers"),
        (
            lambda c: _first(c).update(segmentation=[[1, 2, 3, 4, 5, "6"]]),
            "the coordinate .6.;",
        ),
        (
            lambda c: _first(c).update(segmentation="rle"),
            "dict, found a str",
        ),
        (lambda c: _first(c).update(ignore=1), "annotation 1 .*: it has ignore 1"),
        (
            lambda c: c["images"][0].update(width="64"),
            'image 1 .*: has width "64", expected pixels',
        ),
        (
            lambda c: c["categories"][1].update(name="arrow"),
            "class name there twice .1.: category .*arrow",
        ),
        (lambda c: c["categories"][1].update(id=1), "id there twice .1.: category 1: "),
    ],
)
def test_a_wrong_record_is_counted_and_named(change, message, world):
    _edit(world, change)
    with pytest.raises(InputError, match=message) as caught:
        _check(world)
    assert str(_file(world)) in str(caught.value)


def test_a_box_may_reach_a_pixel_over_the_border(world):
    _edit(world, lambda content: _first(content).update(bbox=[55, -1, 10, 9]))
    _check(world)


def test_boxes_alone_need_no_segmentation(world):
    def strip(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    _edit(world, strip)
    assert len(_check(world, masks=False).image_ids) == 6


def test_run_length_masks_are_taken_as_bitmasks_and_from_crowds(world):
    rle = {"counts": [0, 4096], "size": [64, 64]}
    _edit(world, lambda content: _first(content).update(segmentation=rle))
    _check(world, mask_format="bitmask")
    _edit(world, lambda content: _first(content).update(iscrowd=1))
    _check(world)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"counts": [0, 4096], "size": [32, 128]}, "its size is 128x32, that of the image 64x64"),
        (
            {"counts": [0, 4000], "size": [64, 64]},
            "its runs have 4000 pixels",
        ),
        ({"size": [64, 64]}, "`counts` are neither a text nor a list"),
    ],
)
def test_a_run_length_mask_must_be_one_of_its_image(mask, message, world):
    _edit(world, lambda content: _first(content).update(segmentation=mask))
    with pytest.raises(InputError, match=message):
        _check(world, mask_format="bitmask")


def test_a_segmentation_that_costs_the_box_is_refused_without_a_mask_head_too(world):
    """detectron2 drops the object with a warning: of [[]], which exporters write for boxes."""
    _edit(world, lambda content: _first(content).update(segmentation=[[]]))
    with pytest.raises(InputError, match="leave the key out"):
        _check(world, masks=False)


def test_a_test_sets_masks_may_be_run_lengths_but_its_crowds_need_theirs(world):
    rle = {"counts": [0, 4096], "size": [64, 64]}
    _edit(world, lambda content: _first(content).update(segmentation=rle))
    _check(world, trains=False, tests=True)
    _edit(world, lambda content: _first(content).update(segmentation=[], iscrowd=1))
    _check(world, trains=True, tests=False)
    with pytest.raises(InputError, match="object without a mask .1.: annotation 1 "):
        _check(world, trains=False, tests=True)


def test_a_training_set_of_crowds_alone_is_refused(world):
    def all_crowds(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    _edit(world, all_crowds)
    with pytest.raises(InputError, match="'w_train' has no annotation that is not a crowd"):
        register_datasets(_config(world))


def test_images_without_objects_are_left_out_of_training_but_not_of_the_test(world):
    def empty_the_first(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]

    for split in ("train", "test"):
        _edit(world, empty_the_first, split)
    cfg = _config(world, **{"DATALOADER.NUM_WORKERS": 0})
    register_datasets(cfg)
    assert len(build_train_loader(cfg).training_set.records) == 5
    assert len(TestLoader(cfg, "w_test")) == 3


def test_category_ids_with_gaps_become_class_numbers(world):
    def spread(content):
        for record in content["categories"]:
            record["id"] = 100 - 3 * record["id"]
        for record in content["annotations"]:
            record["category_id"] = 100 - 3 * record["category_id"]

    names = {c["id"]: c["name"] for c in json.loads(_file(world).read_text())["categories"]}
    before = json.loads(_file(world).read_text())["annotations"]
    _edit(world, spread)
    register_datasets(_config(world, test=()))
    found = [a["category_id"] for r in DatasetCatalog.get("w_train") for a in r["annotations"]]
    classes = MetadataCatalog.get("w_train").thing_classes
    assert [classes[number] for number in found] == [names[a["category_id"]] for a in before]


BUILTIN = """\
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.evaluation import build_evaluator
from detectron2.data import DatasetCatalog
from tests.detection.detections import evaluate
cfg = get_virtex_cfg()
cfg.OUTPUT_DIR = "run"
for name, masks in (("coco_2017_val", 1), ("lvis_v0.5_val", 1), ("voc_2007_test", 0)):
    cfg.DATASETS.TEST, cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (name,), bool(masks), -1
    (found,) = register_datasets(cfg, eval_only=True)
    results = evaluate(build_evaluator(cfg, name), DatasetCatalog.get(name))
    print(found.name, found.size, *(round(r["AP"], 3) for r in results.values()))
"""


@pytest.mark.slow
def test_detectron2s_own_names_are_checked_and_evaluated_in_its_layout(
    run_python, real_data, tmp_path
):
    (tmp_path / "lvis").mkdir()
    (tmp_path / "coco").symlink_to(real_data / "coco")
    (tmp_path / "VOC2007").symlink_to(real_data / "VOC2007")
    lvis = real_data / "coco/annotations/lvis_v0.5_val.json"
    (tmp_path / "lvis/lvis_v0.5_val.json").symlink_to(lvis)
    done = run_python("-c", BUILTIN, env={"DETECTRON2_DATASETS": str(tmp_path)}, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("coco_", "lvis", "voc"))]
    assert lines == [
        "coco_2017_val 134 images, 1192 annotations, 80 categories 100.0 100.0",
        "lvis_v0.5_val 47 images, 512 annotations, 1230 categories; LVIS v0.5 100.0 100.0",
        "voc_2007_test 400 images, 1002 annotations, 20 categories; no object of bird, sheep 100.0",
    ], done.stderr


def test_a_share_of_bad_boxes_may_be_allowed_and_is_then_warned_of(world, caplog):
    _edit(world, lambda content: _first(content).update(bbox=[5, 5, 0, 9]))
    with caplog.at_level(logging.WARNING):
        _check(world, max_bad_share=0.5)
    assert "box of no width or height (1): annotation 1" in caplog.text


@pytest.mark.parametrize(
    ("name", "folder", "with_masks", "images"),
    [
        ("instances_train2017", "train2017", True, 217),
        ("person_train", "val2017", True, 578),
        ("boxes_train", "val2017", False, 1442),
    ],
)
def test_real_annotation_files_pass(name, folder, with_masks, images, real_data):
    coco = real_data / "coco"
    share = get_virtex_cfg().VIRTEX.MAX_BAD_BOX_SHARE
    path = coco / f"annotations/{name}.json"
    table = _check_file(path, coco / folder, masks=with_masks, max_bad_share=share)
    assert len(table.image_ids) == images


RECORDS = [{"image_id": number, "annotations": [{}]} for number in range(1000, 2000)]

EXPECTED = [1023, 1310, 1335, 1514, 1651]


def _ids(records):
    return [record["image_id"] for record in records]


def test_fractions_of_one_seed_are_nested_exact_and_in_order():
    taken = [_ids(take_fraction(RECORDS, fraction, 3)) for fraction in (0.02, 0.05, 0.1, 1.0)]
    assert [len(ids) for ids in taken] == [20, 50, 100, 1000]
    for smaller, larger in pairwise(taken):
        assert set(smaller) < set(larger)
        assert larger == sorted(larger)


def test_an_images_place_depends_on_its_id_and_the_seed_alone():
    # Written down: on another machine, with other libraries, the same images are drawn.
    assert _ids(take_fraction(RECORDS, 0.005, 0)) == EXPECTED
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    assert sorted(_ids(take_fraction(shuffled, 0.005, 0))) == EXPECTED
    assert _ids(take_fraction(RECORDS, 0.005, 1)) != EXPECTED
    half = set(_ids(take_fraction(RECORDS, 0.5, 0)))
    rest = [record for record in RECORDS if record["image_id"] not in half]
    grown = [*take_fraction(RECORDS, 0.5, 0), *rest[:10]]
    assert len(half & set(_ids(take_fraction(grown, 0.5, 0)))) == 255


def _few(world, *opts):
    cfg = get_virtex_cfg()
    cfg.VIRTEX.DATASETS = [
        ["f_train", "coco", str(world / "annotations/instances_train.json")]
        + [str(world / "images/train")]
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("f_train",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.merge_from_list(list(opts))
    return cfg


def test_the_training_loader_gets_the_fraction_and_the_log_its_size(three_formats, caplog):
    cfg = _few(three_formats, "VIRTEX.FRACTION", 0.5, "VIRTEX.FRACTION_SEED", 2)
    register_datasets(cfg)
    with caplog.at_level(logging.INFO):
        records = build_train_loader(cfg).training_set.records
    assert len(records) == 3
    every = DatasetCatalog.get("f_train")
    assert {r["image_id"] for r in records} == set(_ids(take_fraction(every, 0.5, 2)))
    total = sum(len(record["annotations"]) for record in every)
    taken = sum(len(record["annotations"]) for record in records)
    assert f"(VIRTEX.FRACTION_SEED 2): 3 of 6 images of f_train, {taken} of {total}" in caplog.text


def test_without_a_fraction_the_data_set_is_itself():
    assert register_fraction("f_train", 1.0, 0) == "f_train"


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_is_above_0_and_at_most_1(fraction, three_formats):
    with pytest.raises(InputError, match="VIRTEX.FRACTION .*expected more than 0, up to 1"):
        register_datasets(_few(three_formats, "VIRTEX.FRACTION", fraction))


def test_a_fraction_that_selects_nothing_is_refused_before_the_run(three_formats):
    with pytest.raises(InputError, match="0.01 of the 6 images of 'f_train' is none: .*0.17"):
        register_datasets(_few(three_formats, "VIRTEX.FRACTION", 0.01))


def test_a_fraction_of_images_without_annotations_is_refused(three_formats, tmp_path):
    content = json.loads((three_formats / "annotations/instances_train.json").read_text())
    chosen = {r["id"] for r in content["images"]} - {
        record["image_id"]
        for record in take_fraction([{"image_id": r["id"]} for r in content["images"]], 0.5, 0)
    }
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    (tmp_path / "half.json").write_text(json.dumps(content))
    cfg = _few(three_formats, "VIRTEX.FRACTION", 0.5)
    cfg.VIRTEX.DATASETS[0][2] = str(tmp_path / "half.json")
    register_datasets(cfg)
    with pytest.raises(InputError, match="none of the 3 images of 'f_train' that it selects"):
        build_train_loader(cfg)
