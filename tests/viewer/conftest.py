"""A small data set with predictions made of its truth: some right, some wrong, some missing."""

import json
import shutil
from pathlib import Path

import pytest
from pycocotools import mask as coco_mask

from virtex_d2.detection.sources import read_annotations


@pytest.fixture
def world(shapes_world, tmp_path) -> Path:
    """A copy of the small world."""
    return Path(shutil.copytree(shapes_world, tmp_path / "world"))


@pytest.fixture
def words(world):
    """The words that name its training split."""
    return "coco", str(world / "annotations/instances_train.json"), str(world / "images/train")


@pytest.fixture
def table(words):
    return read_annotations(words, "train")


@pytest.fixture
def perfect(words):
    """The truth as predictions of score 0.9."""
    content = json.loads(Path(words[1]).read_text())
    return [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": item["bbox"],
            "score": 0.9,
            "segmentation": _compressed(item["segmentation"]),
        }
        for item in content["annotations"]
    ]


@pytest.fixture
def write(tmp_path):
    """`write(records)` -> path of a results file."""

    def to_file(records, name="results.json"):
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)

    return to_file


def _compressed(polygons, side=64):
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, side, side))
    return {**rle, "counts": rle["counts"].decode()}
