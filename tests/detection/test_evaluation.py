"""COCO's, LVIS's and VOC's AP: perfect detections, none, and what cannot be measured."""

import csv
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from tests.detection.detections import evaluate, nothing, perfect
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.evaluation import (
    CocoEvaluator,
    LvisEvaluator,
    VocEvaluator,
    build_evaluator,
)
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes.world import CLASSES

pytestmark = pytest.mark.usefixtures("catalog_as_before")


def _entry(kind, folder, split="test"):
    if kind == "voc":
        return ["e", "voc", str(folder / "VOC"), split, list(CLASSES)]
    name = {"coco": "instances", "lvis": "lvis_v1"}[kind]
    images = folder / "images" / split if kind == "coco" else folder / "images"
    return ["e", kind, str(folder / f"annotations/{name}_{split}.json"), str(images)]


class Evaluation:
    """Registers a data set, evaluates detections of it, and reads what was written."""

    def __init__(self, entry, folder, masks=True):
        cfg = get_virtex_cfg()
        cfg.MODEL.MASK_ON, cfg.OUTPUT_DIR = masks, str(folder)
        cfg.VIRTEX.DATASETS, cfg.DATASETS.TEST = [entry], (entry[0],)
        register_datasets(cfg, eval_only=True)
        self.records = DatasetCatalog.get(entry[0])
        self.evaluator = build_evaluator(cfg, entry[0])
        self.folder = folder / "inference"

    def __call__(self, detect=perfect):
        return evaluate(self.evaluator, self.records, detect)

    def table(self):
        with open(self.folder / "per_class.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def world(three_formats, tmp_path):
    return shutil.copytree(three_formats, tmp_path / "world")


@pytest.fixture
def evaluation(world, tmp_path):
    def make(kind, **kwargs):
        return Evaluation(_entry(kind, world), tmp_path / "run", masks=kind != "voc", **kwargs)

    return make


FORMATS = ("coco", "lvis", "voc")
REAL = {
    "coco": ["coco/annotations/instances_val2017.json", "coco/val2017"],
    "lvis": ["coco/annotations/lvis_v0.5_val.json", "coco"],
    "voc": ["VOC2007", "test"],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_ground_truth_as_detections_has_ap_100_on_real_files(kind, real_data, tmp_path):
    source, rest = REAL[kind]
    rest = rest if kind == "voc" else str(real_data / rest)
    entry = ["real", kind, str(real_data / source), rest]
    run = Evaluation(entry, tmp_path, masks=kind != "voc")
    results = run()
    assert results.keys() == ({"bbox"} if kind == "voc" else {"bbox", "segm"})
    for metrics in results.values():
        for name in ("AP", "AP50", "AP75"):
            assert metrics[name] == pytest.approx(100, abs=1e-6), name
    for row in run.table():
        assert row["AP"] == ("100.0000" if int(row["num_gt"]) else "")
    if kind == "lvis":
        assert [results["segm"][f"AP{group}"] for group in "rcf"] == pytest.approx([100] * 3)
    if kind == "voc":
        both = [results["bbox"][f"AP50_{style}"] for style in ("11point", "area")]
        assert both == pytest.approx([100, 100])


@pytest.mark.parametrize("kind", FORMATS)
def test_no_detection_at_all_has_ap_0_and_not_nan(kind, evaluation):
    run = evaluation(kind)
    for metrics in run(nothing).values():
        assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == 0
    assert all(row["AP"] == ("0.0000" if int(row["num_gt"]) else "") for row in run.table())
    assert len(list(run.folder.glob("*_instances_results.json"))) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_class_without_objects_is_empty_in_the_table_and_left_out_of_the_mean(
    kind, evaluation, caplog
):
    run = evaluation(kind)
    present = {item["category_id"] for record in run.records for item in record["annotations"]}
    assert 2 <= len(present) < len(CLASSES)
    lost = min(present)

    def all_but_one(record):
        found = perfect(record)["instances"]
        return {"instances": found[found.pred_classes != lost]}

    with caplog.at_level(logging.INFO):
        results = run(all_but_one)
    assert results["bbox"]["AP"] == pytest.approx(100 * (len(present) - 1) / len(present))
    without = len(CLASSES) - len(present)
    assert f"bbox: {without} of the {len(CLASSES)} classes have no object in 'e'" in caplog.text
    rows = [row for row in run.table() if row["task"] == "bbox"]
    assert [row["class"] for row in rows] == list(CLASSES)
    for number, row in enumerate(rows):
        objects = sum(a["category_id"] == number for r in run.records for a in r["annotations"])
        expected = "" if not objects else "0.0000" if number == lost else "100.0000"
        assert (int(row["num_gt"]), row["AP"], row["AP50"]) == (objects, expected, expected)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("coco", ["task", "class", "num_gt", "AP", "AP50", "AP75"]),
        ("lvis", ["task", "class", "num_gt", "AP", "AP50", "AP75", "frequency"]),
    ],
)
def test_the_table_has_a_line_for_each_task_and_class(kind, columns, evaluation):
    run = evaluation(kind)
    run()
    assert list(run.table()[0]) == columns
    assert [row["task"] for row in run.table()] == ["bbox"] * len(CLASSES) + ["segm"] * len(CLASSES)
    if kind == "lvis":
        assert {row["frequency"] for row in run.table()} == {"r"}


def _edit(world, kind, change):
    path = Path(_entry(kind, world)[2])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_files_without_areas_and_crowd_flags_and_with_an_id_of_0_are_evaluated(
    kind, world, evaluation
):
    reference = evaluation(kind)()

    def strip(content):
        for number, item in enumerate(content["annotations"]):
            item["id"] = number
            item.pop("area")
            item.pop("iscrowd", None)

    _edit(world, kind, strip)
    results = evaluation(kind)()
    for task, metrics in reference.items():
        assert results[task]["AP"] == 100
        for size in ("APs", "APm", "APl"):
            assert math.isnan(results[task][size]) == math.isnan(metrics[size])


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_category_ids_with_gaps_and_run_length_masks_are_evaluated(kind, world, evaluation):
    def change(content):
        for record in content["categories"]:
            record["id"] = 7 * record["id"] + 3
        for record in content["annotations"]:
            record["category_id"] = 7 * record["category_id"] + 3
        for image in content["images"]:
            if kind == "lvis":
                image["neg_category_ids"] = []
        first = content["annotations"][0]
        first["segmentation"] = {"counts": [0, 4096], "size": [64, 64]}
        first["bbox"], first["area"] = [0, 0, 64, 64], 4096

    _edit(world, kind, change)
    results = evaluation(kind)()
    assert results["bbox"]["AP"] == results["segm"]["AP"] == 100


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_crowds_count_neither_as_objects_nor_against_a_detector(kind, world, evaluation):
    def one_crowd(content):
        content["annotations"][0]["iscrowd"] = 1

    _edit(world, kind, one_crowd)
    run = evaluation(kind)

    def everything(record):
        whole = [{**item, "iscrowd": 0} for item in record["annotations"]]
        return perfect({**record, "annotations": whole})

    assert run()["bbox"]["AP"] == run(everything)["bbox"]["AP"] == 100
    singles = sum(not a["iscrowd"] for r in run.records for a in r["annotations"])
    assert sum(int(row["num_gt"]) for row in run.table() if row["task"] == "bbox") == singles


def test_a_set_without_any_object_has_no_ap_and_does_not_crash(world, evaluation):
    _edit(world, "coco", lambda content: content.update(annotations=[]))
    run = evaluation("coco")
    assert all(math.isnan(run(nothing)[task]["AP"]) for task in ("bbox", "segm"))
    assert all(row["AP"] == "" and row["num_gt"] == "0" for row in run.table())


def test_lvis_does_not_judge_what_is_not_known_of_an_image(world, evaluation):
    """A detection of a class that was not looked for is neither right nor wrong."""

    def forget(content):
        for image in content["images"]:
            image["neg_category_ids"] = []

    run = evaluation("lvis")
    of_image = [{item["category_id"] for item in record["annotations"]} for record in run.records]
    other = min(set.union(*of_image) - of_image[0])

    def one_more(record):
        found = perfect(record)["instances"]
        if record is not run.records[0]:
            found.scores -= 0.5
            return {"instances": found}
        more = found[:1]
        more.pred_classes = torch.tensor([other])
        return {"instances": Instances.cat([more, found])}

    judged = run(one_more)["bbox"]["AP"]
    _edit(world, "lvis", forget)
    run = evaluation("lvis")
    assert judged < run(one_more)["bbox"]["AP"] == 100


def test_lvis_without_rare_classes_has_no_ap_of_them(world, evaluation):
    def frequent(content):
        for category in content["categories"]:
            category["frequency"] = "f"

    _edit(world, "lvis", frequent)
    metrics = evaluation("lvis")()["segm"]
    assert math.isnan(metrics["APr"])
    assert metrics["APf"] == 100


def _noisy(records, num_classes, seed=0):
    """Detections around and beside the objects, on a grid of 0.1 px, with scores that differ."""
    rng = np.random.default_rng(seed)
    scores = iter(rng.permutation(2 * sum(len(record["annotations"]) for record in records)))
    detections = {}
    for record in records:
        boxes, classes = [], []
        for item in record["annotations"] * 2:
            box = np.array(item["bbox"]) + rng.normal(0, 4, 4)
            boxes.append([*np.minimum(box[:2], box[2:]), *(np.maximum(box[:2], box[2:]) + 1)])
            keep = rng.random() < 0.8
            classes.append(item["category_id"] if keep else rng.integers(num_classes))
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(torch.tensor(np.round(boxes, 1)).reshape(-1, 4).float())
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        found.scores = torch.tensor([float(next(scores)) for _ in boxes])
        detections[record["image_id"]] = {"instances": found}
    return lambda record: detections[record["image_id"]]


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc_ap_is_that_of_detectron2s_evaluator(year, real_data, tmp_path):
    five = ["bus", "car", "cat", "person", "train"]
    run = Evaluation(["real", "voc", str(real_data / "VOC2007"), "test", five], tmp_path, False)
    detect = _noisy(run.records, len(five))
    ours = run(detect)["bbox"]
    MetadataCatalog.get("stock").set(
        dirname=str(real_data / "VOC2007"), split="test", year=year, thing_classes=five
    )
    theirs = evaluate(PascalVOCDetectionEvaluator("stock"), run.records, detect)["bbox"]
    suffix = "_11point" if year == 2007 else "_area"
    assert 5 < theirs["AP50"] < 95
    for name in ("AP", "AP50", "AP75"):
        assert ours[name + suffix] == pytest.approx(theirs[name], abs=1e-6)
    assert ours["AP"] == ours["AP_11point"] != ours["AP_area"]


def test_voc_counts_the_second_detection_of_an_object_as_wrong_and_skips_difficult_ones(tmp_path):
    from tests.annotations.test_voc import write_voc

    easy = ("cat", (1, 1, 20, 20), "")
    hard = ("cat", (21, 1, 40, 20), "<difficult>1</difficult>")
    folder = write_voc(tmp_path / "v", {"a": [easy, hard], "b": [easy]})
    run = Evaluation(["v", "voc", str(folder), "train", ["cat", "dog"]], tmp_path, masks=False)

    def scored(*pairs):
        found = Instances((30, 40))
        found.pred_boxes = Boxes(torch.tensor([box for box, _ in pairs]).reshape(-1, 4).float())
        found.pred_classes = torch.zeros(len(pairs), dtype=torch.int64)
        found.scores = torch.tensor([score for _, score in pairs])
        return {"instances": found}

    of_easy, of_hard = [0, 0, 20, 20], [20, 0, 40, 20]
    found = {
        "a": scored((of_easy, 0.9), (of_easy, 0.8), (of_hard, 0.95)),
        "b": scored((of_easy, 0.7)),
    }
    metrics = run(lambda record: found[record["image_id"]])["bbox"]
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    assert metrics["AP50_area"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    assert metrics["AP50_11point"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert metrics["AP50"] == metrics["AP50_area"]  # no folder of 2007
    assert [row["num_gt"] for row in run.table()] == ["2", "0"]
    predictions = json.loads((run.folder / "voc_instances_results.json").read_text())
    assert predictions[0]["image_id"] == "a"
    assert predictions[0]["bbox"] == of_easy


@pytest.mark.parametrize(
    ("kind", "name", "evaluator"),
    [
        ("coco", "unit_train", CocoEvaluator),
        ("lvis", "unit_lvis_v1", LvisEvaluator),
        ("pascal_voc", "unit_voc", VocEvaluator),
    ],
)
def test_the_evaluator_follows_the_data_sets_type(
    kind, name, evaluator, detection_cfg, three_formats
):
    metadata = MetadataCatalog.get(name)
    if kind == "lvis":
        metadata.set(json_file=str(three_formats / "annotations/lvis_v1_test.json"))
    if kind == "pascal_voc":
        folder = str(three_formats / "VOC")
        metadata.set(dirname=folder, split="test", year=2007, thing_classes=["circle"])
        detection_cfg.MODEL.MASK_ON = False
    metadata.evaluator_type = kind
    detection_cfg.DATASETS.TEST = (name,)
    assert type(build_evaluator(detection_cfg, name)) is evaluator


def test_a_data_set_without_a_known_type_is_told(detection_cfg):
    MetadataCatalog.get("unit_odd").evaluator_type = "cocoo"
    with pytest.raises(InputError, match="evaluator_type 'cocoo'.*Did you mean 'coco'"):
        build_evaluator(detection_cfg, "unit_odd")
