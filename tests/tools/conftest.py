"""tools/train_net.py in this process, on a copy of a small world."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import logger as detectron2_logger

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.engine.lock import release_locks
from virtex_d2.engine.run import LOGGERS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"


def _load_tool(path=TOOL):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_tool(monkeypatch):
    """`run_tool(path, *arguments)` -> the exit code of a tool whose `main` parses, run in here."""

    def run(path, *arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        try:
            with exit_on_input_error():
                return _load_tool(path).main() or 0
        except SystemExit as error:
            return error.code

    return run


def _data(world):
    entries = [
        [f"tool_{split}", "coco", str(world / f"annotations/instances_{split}.json")]
        + [str(world / "images" / split)]
        for split in ("train", "test")
    ]
    return ["VIRTEX.DATASETS", repr(entries)]


class Tool:
    """Runs the tool in this process: `tool(*arguments)` -> exit code; and reads what it wrote."""

    def __init__(self, arguments, output):
        self._arguments, self.output = arguments, output

    def __call__(self, *arguments):
        flags = [argument for argument in arguments if str(argument).startswith("--")]
        pairs = [str(argument) for argument in arguments if argument not in flags]
        arguments = [*flags, *self._arguments, "OUTPUT_DIR", str(self.output), *pairs]
        try:
            with exit_on_input_error():
                _load_tool().main(argument_parser().parse_args(arguments))
        except SystemExit as error:
            return error.code
        finally:
            release_locks()  # as `launch` does
            for name in LOGGERS:
                for handler in list(logging.getLogger(name).handlers):
                    logging.getLogger(name).removeHandler(handler)
            detectron2_logger.setup_logger.cache_clear()
        return 0

    def metrics(self):
        lines = (self.output / "metrics.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def log(self):
        return (self.output / "log.txt").read_text()

    def checkpoint(self, name):
        return torch.load(self.output / name, weights_only=True)


@pytest.fixture(autouse=True)
def _catalog_as_before():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def world(shapes_world, tmp_path):
    """A copy of the small world, to be damaged."""
    return Path(shutil.copytree(shapes_world, tmp_path / "world"))


@pytest.fixture
def data(world):
    """The tool's arguments that name the world's two splits."""
    names = ["DATASETS.TRAIN", "('tool_train',)", "DATASETS.TEST", "('tool_test',)"]
    return [*_data(world), *names]


@pytest.fixture
def make_tool(small_detector, data, tmp_path):
    """`make_tool(kind, folder)` -> the tool for a small "FPN" or "C4" detector."""

    def make(kind="FPN", folder="run"):
        return Tool([*small_detector(kind), *data], tmp_path / folder)

    return make


@pytest.fixture
def tool(make_tool):
    return make_tool()
