"""Files of LVIS's format: either version's, or anybody's."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from virtex_d2.annotations.usable import Use, require_usable
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import LVIS_VERSIONS, register_datasets
from virtex_d2.detection.sources import read_annotations
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("catalog_as_before")


@pytest.fixture
def world(three_formats, tmp_path):
    """A copy of the small world, to be damaged."""
    shutil.copytree(three_formats, tmp_path / "world")
    return tmp_path / "world"


def _file(world, split="train"):
    return world / "annotations" / f"lvis_v1_{split}.json"


def _edit(world, change, split="train"):
    content = json.loads(_file(world, split).read_text())
    change(content)
    _file(world, split).write_text(json.dumps(content))


def _check(world, images="images", **use):
    table = read_annotations(("lvis", str(_file(world)), str(world / images)), "l")
    require_usable(table, Use(**use))
    return table


def _config(world, train=("l_train",), test=("l_test",)):
    cfg = get_virtex_cfg()
    cfg.VIRTEX.DATASETS = [
        [f"l_{split}", "lvis", str(_file(world, split)), str(world / "images")]
        for split in ("train", "test")
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    return cfg


def test_a_file_of_the_format_has_its_own_classes_and_images(world):
    cfg = _config(world)
    train, _ = register_datasets(cfg)
    records = DatasetCatalog.get("l_train")
    content = json.loads(_file(world).read_text())
    assert len(records) == 6
    assert records[0]["file_name"] == str(world / "images/train/000000.jpg")
    assert sum(len(record["annotations"]) for record in records) == len(content["annotations"])
    names = [category["name"] for category in content["categories"]]
    assert MetadataCatalog.get("l_train").thing_classes == names
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(names)
    assert "categories of its own" in train.size


def test_without_coco_url_the_file_name_says_where_an_image_is(world):
    def rename(content):
        for image in content["images"]:
            image["file_name"] = image.pop("coco_url").removeprefix("shapes/")

    _edit(world, rename)
    assert len(_check(world, tests=False).image_ids) == 6


def test_run_length_masks_and_polygons_may_be_mixed_as_bitmasks(world):
    full = {"counts": [0, 4096], "size": [64, 64]}
    _edit(world, lambda content: content["annotations"][0].update(segmentation=full))
    cfg = _config(world, test=())
    cfg.MODEL.MASK_ON = True
    with pytest.raises(InputError, match="run-length mask, but INPUT.MASK_FORMAT is polygon"):
        register_datasets(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    register_datasets(cfg)
    from detectron2.data import DatasetMapper

    record = DatasetCatalog.get("l_train")[0]
    masks = DatasetMapper(cfg, is_train=True)(record)["instances"].gt_masks
    assert bool(masks.tensor[0].all())
    assert len(masks) > 1


@pytest.fixture
def named(world):
    """`named(name, categories)`: registers the world's file, with other categories, as detectron2
    would under this name, checks it, and gives what was found.
    """

    def check(name, categories=None):
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        content = json.loads(_file(world).read_text())
        if categories:
            content["categories"] = [
                {"id": key, "name": text, "frequency": "f"} for key, text in categories.items()
            ]
            content["annotations"] = content["annotations"][:1]
            content["annotations"][0]["category_id"] = min(categories)
            for image in content["images"]:
                image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
            _file(world).write_text(json.dumps(content))
        DatasetCatalog.register(name, list)
        metadata = {"json_file": str(_file(world)), "image_root": str(world / "images")}
        MetadataCatalog.get(name).set(evaluator_type="lvis", **metadata)
        cfg = _config(world, train=(name,), test=())
        return register_datasets(cfg)[0].size

    return check


def test_the_versions_are_told_by_their_categories(named):
    assert {len(table) for table in LVIS_VERSIONS.values()} == {1230, 1203}
    assert "LVIS v0.5" in named("mine", LVIS_VERSIONS["v0.5"])
    assert "LVIS v1" in named("lvis_v1_train", LVIS_VERSIONS["v1"])
    part = dict(list(LVIS_VERSIONS["v1"].items())[:50])
    assert "categories of its own" in named("lvis_v0.5_val_cocofied", part)


def test_detectron2s_name_of_one_version_does_not_take_the_file_of_the_other(named):
    with pytest.raises(InputError, match=r"'lvis_v1_val' is LVIS v1 .* but the file holds LVIS v0"):
        named("lvis_v1_val", LVIS_VERSIONS["v0.5"])
    with pytest.raises(InputError, match=r"holds 1 categories of another list"):
        named("lvis_v0.5_train", {1: "person"})


@pytest.mark.parametrize("name", ["lvis_train", "lvis_val", "LVIS"])
def test_lvis_without_its_version_is_an_error_that_names_the_versions(name, world):
    with pytest.raises(InputError, match=r"lvis_v1_train .*1203.* lvis_v0\.5_train .*1230"):
        register_datasets(_config(world, train=(name,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][2].pop("neg_category_ids"), "image 3 .*: lacks neg_category_ids"),
        (
            lambda c: c["categories"][0].update(frequency="often"),
            '1 .circle.: has frequency "often"',
        ),
    ],
)
def test_what_only_the_evaluation_needs_is_asked_for_where_there_is_one(change, message, world):
    _edit(world, change)
    _check(world, tests=False)
    with pytest.raises(InputError, match=message):
        _check(world, tests=True)


def test_absent_images_are_told_with_the_folder_that_was_expected(world):
    with pytest.raises(InputError, match=r"so are not 6 images.*the folder above those"):
        _check(world, images="images/train", tests=False)


def test_the_real_file_is_lvis_v05(real_data):
    coco = real_data / "coco"
    path = str(coco / "annotations/lvis_v0.5_val.json")
    table = read_annotations(("lvis", path, str(coco)), "real")
    require_usable(table, Use(masks=True))
    assert table.categories == LVIS_VERSIONS["v0.5"]
    assert (len(table.image_ids), len(table.records)) == (47, 512)
