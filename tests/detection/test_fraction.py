"""A fraction of the training images."""

import json
import logging
import random
from itertools import pairwise

import pytest
from detectron2.data import DatasetCatalog

from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets, register_fraction, take_fraction
from virtex_d2.detection.loader import build_train_loader
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("catalog_as_before")

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


def _config(world, *opts):
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
    cfg = _config(three_formats, "VIRTEX.FRACTION", 0.5, "VIRTEX.FRACTION_SEED", 2)
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
        register_datasets(_config(three_formats, "VIRTEX.FRACTION", fraction))


def test_a_fraction_that_selects_nothing_is_refused_before_the_run(three_formats):
    with pytest.raises(InputError, match="0.01 of the 6 images of 'f_train' is none: .*0.17"):
        register_datasets(_config(three_formats, "VIRTEX.FRACTION", 0.01))


def test_a_fraction_of_images_without_annotations_is_refused(three_formats, tmp_path):
    content = json.loads((three_formats / "annotations/instances_train.json").read_text())
    chosen = {r["id"] for r in content["images"]} - {
        record["image_id"]
        for record in take_fraction([{"image_id": r["id"]} for r in content["images"]], 0.5, 0)
    }
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    (tmp_path / "half.json").write_text(json.dumps(content))
    cfg = _config(three_formats, "VIRTEX.FRACTION", 0.5)
    cfg.VIRTEX.DATASETS[0][2] = str(tmp_path / "half.json")
    register_datasets(cfg)
    with pytest.raises(InputError, match="none of the 3 images of 'f_train' that it selects"):
        build_train_loader(cfg)
