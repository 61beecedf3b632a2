"""A sound data set of each format, and the means to break one record of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.sources import read_annotations
from virtex_d2.studies.shapes.write import write_dataset


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A world in all formats; splits "train" (5 images of 64 px) and "val" (4)."""
    folder = tmp_path_factory.mktemp("sound")
    for split, count, seed in (("train", 5, 1), ("val", 4, 2)):
        write_dataset(folder, split, count, 64, seed, formats=("coco", "lvis", "voc"))
    return folder


@pytest.fixture
def world(sound, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "world"))


def words(world: Path, kind: str = "coco", split: str = "train") -> tuple[str, str, str]:
    """The three words that name a data set of the world."""
    if kind == "voc":
        return "voc", str(world / "VOC"), split
    if kind == "lvis":
        return "lvis", str(world / f"annotations/lvis_v1_{split}.json"), str(world / "images")
    file = world / f"annotations/instances_{split}.json"
    return "coco", str(file), str(world / "images" / split)


def read(world: Path, kind: str = "coco", split: str = "train") -> AnnotationTable:
    return read_annotations(words(world, kind, split), split)


def edit(world: Path, change: Callable[[dict], object], kind: str = "coco") -> None:
    """Change the content of the training split's annotation file."""
    path = Path(words(world, kind)[1])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
