"""Small labelled sets that are easy to tell apart, a thin ResNet, the probe in this process."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.utils import logger as detectron2_logger

from tests.checkpoint.layout_files import THIN, random_resnet
from tests.probes.small_sets import COLOURS, picture, write_voc
from virtex_d2.checkpoint.resnet import ResNet
from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.config import load_config
from virtex_d2.engine.files import write_safetensors
from virtex_d2.engine.lock import release_locks
from virtex_d2.engine.run import LOGGERS
from virtex_d2.studies.probes.config import get_probe_cfg
from virtex_d2.studies.probes.run import run_probe

METADATA = {
    "format": "virtex_d2.backbone",
    "format_version": "1",
    "architecture": "a thin resnet50",
    "channel_order": "RGB",
    "pixel_mean": "123.675,116.28,103.53",
    "pixel_std": "58.395,57.12,57.375",
    "stride_in_1x1": "false",
}


@pytest.fixture
def voc(tmp_path) -> Path:
    """A VOC folder of three colours: 24 training images, 12 test images."""
    images = {
        f"{split}{number:02}": [(colour, False)]
        for split, count in (("train", 24), ("test", 12))
        for number, colour in zip(range(count), [*COLOURS] * count)
    }
    splits = {s: [n for n in images if n.startswith(s)] for s in ("train", "test")}
    write_voc(tmp_path / "VOC", images, {"trainval": splits["train"], "test": splits["test"]})
    return tmp_path / "VOC"


@pytest.fixture
def folders(tmp_path) -> Path:
    """A folder for each of three colours: 8 training and 4 test images of each."""
    root = tmp_path / "folders"
    for split, count in (("train", 8), ("val", 4)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 100 * label + number + 1000 * (split == "val")
                picture(colour, seed).save(folder / f"{number}.png")
    return root


@pytest.fixture
def inaturalist(folders) -> Path:
    """The same images with iNaturalist's JSON files, train.json and val.json."""
    ids = {"red": 7, "green": 3, "blue": 11}
    for split in ("train", "val"):
        files = sorted((folders / split).rglob("*.png"))
        images = [
            {"id": 50 + n, "file_name": str(f.relative_to(folders))} for n, f in enumerate(files)
        ]
        annotations = [
            {"id": n, "image_id": 50 + n, "category_id": ids[f.parent.name]}
            for n, f in enumerate(files)
        ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
        (folders / f"{split}.json").write_text(json.dumps(content))
    return folders


@pytest.fixture(scope="session")
def thin_backbone(tmp_path_factory) -> Callable[..., Path]:
    """`thin_backbone(seed, architecture, **metadata)` -> a backbone file of random tensors, of a
    ResNet-50 with few channels where no other is asked for.
    """
    folder = tmp_path_factory.mktemp("thin")

    def write(seed: int = 0, architecture: ResNet = THIN, **metadata: str) -> Path:
        path = folder / f"{seed}-{len(list(folder.iterdir()))}.safetensors"
        tensors = random_resnet(architecture, seed, counters=False)
        write_safetensors(path, tensors, {**METADATA, **metadata})
        return path

    return write


SMALL = ["INPUT.RESIZE", "36", "INPUT.CROP", "32", "DATA.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def make_cfg(tmp_path, thin_backbone) -> Callable:
    """`make_cfg(KEY, value, ...)` -> a small config: a thin ResNet-50, 32 pixels."""

    def make(*opts: object):
        paths = ["DATA.CACHE_DIR", tmp_path / "cache", "OUTPUT_DIR", tmp_path / "run"]
        given = [] if "MODEL.WEIGHTS" in opts else ["MODEL.WEIGHTS", thin_backbone()]
        return load_config(get_probe_cfg(), "", [*map(str, [*SMALL, *paths, *given, *opts])])

    return make


@pytest.fixture
def probe(make_cfg) -> Callable:
    """`probe(KEY, value, ..., resume=False)` -> metrics, of the whole probe in this process;
    with `judge=probe_folder` of a folder's checkpoints.
    """

    def run(*opts: object, resume: bool = False, judge: Callable = run_probe):
        try:
            args = argument_parser().parse_args(["--resume"] if resume else [])
            return judge(make_cfg(*opts), args)
        finally:
            release_locks()  # as `launch` does
            for name in LOGGERS:
                for handler in list(logging.getLogger(name).handlers):
                    logging.getLogger(name).removeHandler(handler)
                logging.getLogger(name).propagate = True
            detectron2_logger.setup_logger.cache_clear()

    return run
