"""The detectors' config files."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.modeling import resolve_norms
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.config import load_config
from virtex_d2.studies.shapes.world import CLASSES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(
    file.relative_to(CONFIGS).as_posix()
    for file in CONFIGS.rglob("*.yaml")
    if not {"pretrain", "probes", "recognition"} & set(file.relative_to(CONFIGS).parts)
)
DETECTORS = [name for name in FILES if not Path(name).name.startswith("Base")]
# Of the paper's tables, and those that differ from them in their schedule alone.
FULL_SIZE = [name for name in DETECTORS if not name.endswith(("small.yaml", "smoke.yaml"))]
FULL_SIZE = [name for name in FULL_SIZE if not name.startswith("shapes")]


def _config(name, *opts):
    return load_config(get_virtex_cfg(), str(CONFIGS / name), list(opts))


@pytest.mark.parametrize("name", DETECTORS)
def test_every_config_feeds_and_trains_the_backbone_as_the_paper_does(name):
    cfg = _config(name)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.RESNETS.DEPTH == 50
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.TEST.PRECISE_BN.ENABLED
    frozen = "imagenet" in name
    assert cfg.MODEL.RESNETS.NORM == ("FrozenBN" if frozen else "SyncBN")
    assert cfg.MODEL.FPN.NORM == ("SyncBN" if "FPN" in name and not frozen else "")
    assert ("C4" in name) == (cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm")
    assert cfg.MODEL.MASK_ON == name.split("/")[1].startswith("mask_rcnn")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_protocol_is_the_papers(name):
    cfg = _config(name)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    schedules = {
        "_2x": (180000, (120000, 160000)),
        "_1x": (90000, (60000, 80000)),
        "_few_labels": (18000, (12000, 16000)),
        "_07_12_24k": (24000, (18000, 22000)),
        "_C4_07": (7200, (5400, 6600)),
    }
    stem = Path(name).stem.removesuffix("_imagenet")
    (expected,) = [value for ending, value in schedules.items() if stem.endswith(ending)]
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == expected
    voc, lvis = name.startswith("voc"), name.startswith("lvis")
    smallest = cfg.INPUT.MIN_SIZE_TRAIN[0]
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(smallest, 801, 32))
    assert smallest == (480 if voc else 640)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    assert cfg.SOLVER.WARMUP_ITERS == (100 if voc else 1000)
    sampler = "RepeatFactorTrainingSampler" if lvis else "TrainingSampler"
    assert cfg.DATALOADER.SAMPLER_TRAIN == sampler
    assert cfg.DATALOADER.REPEAT_THRESHOLD == (0.001 if lvis else 0)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == (300 if lvis else 100)
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == (0.0001 if lvis else 0.05)
    assert (0.1 if "few_labels" in name else 1.0) == cfg.VIRTEX.FRACTION


@pytest.mark.parametrize(
    ("part", "train", "test"),
    [
        ("coco/mask_rcnn_R_50_FPN_2x", ("coco_2017_train",), "coco_2017_val"),
        ("coco/mask_rcnn_R_50_C4_2x", ("coco_2017_train",), "coco_2017_val"),
        ("lvis/mask_rcnn_R_50_FPN_v1_2x_imagenet", ("lvis_v1_train",), "lvis_v1_val"),
        ("lvis/mask_rcnn_R_50_FPN_v0.5_1x_imagenet", ("lvis_v0.5_train",), "lvis_v0.5_val"),
        (
            "voc/faster_rcnn_R_50_C4_07_12_24k",
            ("voc_2007_trainval", "voc_2012_trainval"),
            "voc_2007_test",
        ),
        ("voc/faster_rcnn_R_50_C4_07", ("voc_2007_trainval",), "voc_2007_test"),
    ],
)
def test_the_data_sets_go_by_detectron2s_names(part, train, test):
    cfg = _config(f"{part}.yaml")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (train, (test,))


def _format(name):
    return next((kind for kind in ("lvis", "voc") if name.startswith(kind)), "coco")


def _tiny_data(kind, world):
    if kind == "voc":
        rest = {split: [str(world / "VOC"), split, list(CLASSES)] for split in ("train", "test")}
    else:
        file = {"coco": "instances", "lvis": "lvis_v1"}[kind]
        rest = {
            split: [
                str(world / f"annotations/{file}_{split}.json"),
                str(world / "images" / (split if kind == "coco" else "")),
            ]
            for split in ("train", "test")
        }
    entries = [[f"tiny_{split}", kind, *rest[split]] for split in rest]
    names = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_test',)"]
    return ["VIRTEX.DATASETS", repr(entries), *names]


# A quarter of the channels; there are no weights of that shape.
THIN_R50 = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"]


@pytest.mark.slow
@pytest.mark.usefixtures("catalog_as_before")
@pytest.mark.parametrize("name", DETECTORS)
def test_every_config_trains_and_evaluates_a_thin_model_on_data_of_its_format(
    name, three_formats, small_detector, backbone_file, tmp_path
):
    kind = "C4" if "C4" in name else "FPN"
    masks = _config(name).MODEL.MASK_ON
    thin = ["MODEL.WEIGHTS", str(backbone_file("resnet18"))] if kind == "FPN" else THIN_R50
    cfg = _config(
        name,
        *small_detector(kind)[2:],
        *thin,
        *_tiny_data(_format(name), three_formats),
        *("MODEL.MASK_ON", str(masks)),
        *("VIRTEX.FRACTION", "0.5", "OUTPUT_DIR", str(tmp_path / "run")),
    )
    register_datasets(cfg)
    resolve_norms(cfg)
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert len(trainer.data_loader.training_set.records) == 3
    last = json.loads((tmp_path / "run/metrics.json").read_text().splitlines()[-1])
    tasks = ["bbox", "segm"] if masks else ["bbox"]
    assert all(0 <= last[f"{task}/AP"] <= 100 for task in tasks)
    with open(tmp_path / "run/inference/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["class"]) for row in rows] == [(t, c) for t in tasks for c in CLASSES]
    shutil.rmtree(tmp_path / "run")  # gigabytes in all
