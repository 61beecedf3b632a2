"""What all tests share: one thread, and where optional real data lies."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import virtex_d2  # noqa: F401  # before detectron2, so that its bridges are in place
from tests.e2e.forked_runs import shared_server
from tests.processes import python
from tests.slurm.cluster import missing_slurm_programs

ROOT = Path(__file__).resolve().parent.parent

# The same examples every time, so that a change is not held up by what another one left. New
# ones: pytest --hypothesis-profile explore
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Several threads on a busy machine are slower than one, and tests are small.
    torch.set_num_threads(1)
    missing = missing_slurm_programs()
    if os.environ.get("REQUIRE_SLURM") == "1" and missing:
        raise pytest.UsageError(
            f"REQUIRE_SLURM=1, but {', '.join(missing)} not found: apt-get install slurm-wlm munge"
        )


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests of jobs and of stops wait more than they compute."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each process begin with its share of the slow tests; quick ones even the end out.

    xdist's worksteal gives each an equal part of the list to begin with.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = [
        item
        for part in range(processes)
        for some in (slow, quick)
        for item in some[len(some) * part // processes : len(some) * (part + 1) // processes]
    ]


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python *arguments` in a process of its own, with the project importable.

    Keyword arguments: `env` (added to the environment), `cwd`, `timeout` (seconds), `input`, and
    `fresh`: whether Python is started anew, as it is for options of Python (`-c`, `-m`) and for
    scripts from elsewhere in any case; the project's scripts are run by a fork of a process that
    has imported everything; with `processes`, by so many as torchrun would start. The result has
    text in stdout and stderr; a failure does not raise.
    """

    def run(
        *arguments: object,
        env: dict | None = None,
        fresh: bool = False,
        processes: int = 1,
        timeout: float = 300.0,
        **kwargs,
    ) -> subprocess.CompletedProcess:
        argv = [str(argument) for argument in arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        script = Path(kwargs.get("cwd") or Path.cwd(), argv[0])
        if not fresh and script.suffix == ".py" and script.is_relative_to(ROOT):
            argv = [*python(processes)[1:], *argv]
            return shared_server().run(argv, environment, timeout=timeout, **kwargs)
        assert processes == 1, "several are forked"
        return subprocess.run(
            [sys.executable, *argv],
            **{"capture_output": True, "text": True, "timeout": timeout, "check": False, **kwargs},
            env=environment,
        )

    return run


@pytest.fixture
def thin_resnets(monkeypatch) -> None:
    """What pretraining calls resnet18 is thin in this test (`tests.thin.resnets`)."""
    from tests.thin.resnets import install

    install(monkeypatch.setattr)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real photographs (COCO and VOC layouts), from VIRTEX_TEST_DATA."""
    return _optional_folder("VIRTEX_TEST_DATA", ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def parity_cases() -> Path:
    """The folder with parity cases (losses and logits of the original), from PARITY_CASES."""
    return _optional_folder("PARITY_CASES", ROOT.parent / "shared" / "parity")


# The smallest detectors that still have every part: heads and pyramid are thin, proposals few.
_SMALL_DETECTOR = """\
MODEL.DEVICE cpu MODEL.MASK_ON True
MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50
MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 10
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
MODEL.ROI_MASK_HEAD.CONV_DIM 16
TEST.DETECTIONS_PER_IMAGE 5 TEST.PRECISE_BN.NUM_ITER 1
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.002 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS (100,)
SOLVER.MAX_ITER 2 SEED 1"""
_SMALL = {
    "FPN": """\
MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 16
MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32],[64],[128]]
MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.NUM_CONV 1""",
    "C4": "MODEL.ANCHOR_GENERATOR.SIZES [[16,32,64]]",
}
# ResNet-50's depth, an eighth of its width: FPN's ResNet-18 cannot be thinner, and C4 has no other.
THIN_BACKBONE = """\
MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8
MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 32"""
_SMALL["thin FPN"] = f"{_SMALL['FPN']} {THIN_BACKBONE}"


@pytest.fixture(scope="session")
def small_detector() -> Callable[..., list[str]]:
    """`small_detector(kind)` -> tools/train_net.py's arguments for a quick CPU detector.

    `kind`: "FPN" (a ResNet-18), "C4" (a ResNet-50; detectron2 has no smaller res5 head) or
    "thin FPN", of which a checkpoint has a twentieth of the bytes: for tests that save many.
    """

    def arguments(kind: str = "FPN") -> list[str]:
        config = ROOT / "configs" / f"Base-RCNN-{kind.split()[-1]}.yaml"
        return ["--config-file", str(config), *_SMALL_DETECTOR.split(), *_SMALL[kind].split()]

    return arguments


@pytest.fixture(scope="session")
def detector_config(small_detector) -> Callable:
    """`detector_config(kind, *overrides)` -> the config of `small_detector`, norms resolved."""
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.modeling import resolve_norms
    from virtex_d2.engine.config import load_config

    def config(kind: str = "FPN", *overrides: object):
        _, file, *opts = small_detector(kind)
        opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "3", *map(str, overrides)]
        cfg = load_config(get_virtex_cfg(), file, opts)
        resolve_norms(cfg)
        return cfg

    return config


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory) -> Callable[..., Path]:
    """`backbone_file(architecture, **metadata)` -> a backbone file of random weights.

    Its running statistics are random too, so that one left behind shows. `metadata` replaces
    entries, or with None removes them.
    """
    import torch
    import torchvision

    from virtex_d2.engine.files import write_safetensors

    folder = tmp_path_factory.mktemp("backbones")

    def write(architecture: str = "resnet18", **metadata: str | None) -> Path:
        model = getattr(torchvision.models, architecture)()
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.rand(tensor.shape, generator=generator) + 0.5
            if "running" in name
            else tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith("fc.") and "num_batches" not in name
        }
        entries = {
            "format": "virtex_d2.backbone",
            "format_version": "1",
            "architecture": architecture,
            "channel_order": "RGB",
            "pixel_mean": "123.675,116.28,103.53",
            "pixel_std": "58.395,57.12,57.375",
            "stride_in_1x1": "false",
            **metadata,
        }
        entries = {key: value for key, value in entries.items() if value is not None}
        path = folder / f"{architecture}-{len(list(folder.iterdir()))}.safetensors"
        write_safetensors(path, tensors, entries)
        return path

    return write


@pytest.fixture(scope="session")
def three_formats(tmp_path_factory) -> Path:
    """The splits of `shapes_world` as COCO's, LVIS's and VOC's files."""
    from virtex_d2.studies.shapes.write import write_dataset

    folder = tmp_path_factory.mktemp("formats")
    formats = ("coco", "lvis", "voc")
    write_dataset(folder, "train", 6, size=64, seed=1, formats=formats)
    write_dataset(folder, "test", 3, size=64, seed=2, formats=formats)
    return folder


@pytest.fixture(scope="session")
def shapes_world(tmp_path_factory) -> Path:
    """A folder with the splits "train" (6 images of 64 px) and "test" (3) of the shapes world."""
    from virtex_d2.studies.shapes.write import write_dataset

    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, "train", 6, size=64, seed=1)
    write_dataset(folder, "test", 3, size=64, seed=2)
    return folder


@pytest.fixture
def detection_cfg(shapes_world, detector_config, tmp_path, catalog_as_before):
    """The config of a small detector on a copy of the small world; no test set is chosen.

    Data sets "unit_train" and "unit_test" are registered; OUTPUT_DIR does not exist yet.
    """
    from virtex_d2.detection.datasets import register_datasets

    world = Path(shutil.copytree(shapes_world, tmp_path / "world"))
    cfg = detector_config("FPN", "MODEL.ROI_HEADS.NUM_CLASSES", -1)
    cfg.VIRTEX.DATASETS = [
        [f"unit_{split}", "coco", str(world / f"annotations/instances_{split}.json")]
        + [str(world / "images" / split)]
        for split in ("train", "test")
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("unit_train",), ("unit_test",)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    register_datasets(cfg)
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture
def catalog_as_before() -> Iterator[None]:
    """Takes the data sets that a test registers out of detectron2's catalogs again."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(MetadataCatalog.list())
    yield
    for name in set(MetadataCatalog.list()) - before:
        MetadataCatalog.remove(name)
        DatasetCatalog.pop(name, None)


def _optional_folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable) or default)
    if not folder.is_dir():
        message = f"no folder {folder}; set {variable} to run this test"
        if os.environ.get("REQUIRE_REAL_DATA") == "1":
            pytest.fail(f"REQUIRE_REAL_DATA=1, but {message}")
        pytest.skip(message)
    return folder.resolve()
