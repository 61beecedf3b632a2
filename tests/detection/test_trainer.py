"""The parts of fine-tuning that tools/train_net.py only shows from outside."""

import json
import types
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.common import DatasetFromList
from detectron2.utils.events import EventStorage
from PIL import Image

from virtex_d2.detection.evaluation import (
    CocoEvaluator,
    LvisEvaluator,
    VocEvaluator,
    build_evaluator,
)
from virtex_d2.detection.loader import ReplacingMapper, TestLoader, build_train_loader
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.hooks import SkippedImages


@pytest.fixture
def cfg(detection_cfg):
    return detection_cfg


def _images(cfg):
    return sorted(Path(cfg.VIRTEX.DATASETS[0][3]).iterdir())


def test_the_next_readable_record_replaces_an_unusable_one(cfg):
    images = _images(cfg)
    for index in (4, 5):
        images[index].write_bytes(images[index].read_bytes()[:100])
    records = build_train_loader(cfg).training_set.records
    mapper = ReplacingMapper(cfg, records)
    by_file = {Path(record["file_name"]).name: record for record in records}
    names = sorted(by_file)
    for index, stands_in in ((3, 3), (4, 0), (5, 0)):
        sample = mapper(dict(by_file[names[index]]))
        assert Path(sample["file_name"]).name == names[stands_in]
        skipped = [Path(file).name for file, _ in sample["unusable"]]
        assert skipped == names[index : 6 if stands_in == 0 else index]


def test_an_image_of_another_size_than_annotated_is_unusable_not_a_crash(cfg):
    path = Path(cfg.VIRTEX.DATASETS[0][2])
    content = json.loads(path.read_text())
    content["images"][0]["width"] = 80
    path.write_text(json.dumps(content))
    records = build_train_loader(cfg).training_set.records
    sample = ReplacingMapper(cfg, records)(dict(records[0]))
    (unusable,) = sample["unusable"]
    assert unusable[0] == records[0]["file_name"]
    assert "Mismatched image shape" in unusable[1]


def test_an_image_that_pillow_refuses_for_its_size_is_named_like_any_other(cfg, monkeypatch):
    """More than 178 956 970 pixels in a file of 20 kB; here of a lower limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    path = Path(cfg.VIRTEX.DATASETS[0][2])
    content = json.loads(path.read_text())
    content["images"][0].update(width=64, height=129)
    path.write_text(json.dumps(content))
    Image.new("1", (64, 129)).save(_images(cfg)[0], "PNG")
    records = build_train_loader(cfg).training_set.records
    ((file, why),) = ReplacingMapper(cfg, records)(dict(records[0]))["unusable"]
    assert file == records[0]["file_name"] == str(_images(cfg)[0])
    assert "DecompressionBombError: Image size (8256 pixels) exceeds limit" in why
    cfg.DATASETS.TEST = ("unit_train",)
    with pytest.raises(InputError, match=f"{file}: this test image is unusable .Decompression"):
        list(TestLoader(cfg, "unit_train"))


def _hook(skipped, max_share, total=10):
    hook = SkippedImages(lambda: skipped, total, max_share, "VIRTEX.MAX_SKIPPED_SHARE", period=1)
    storage = EventStorage()
    hook.trainer = types.SimpleNamespace(iter=0, max_iter=5, storage=storage)
    return hook, storage


def test_skipped_images_are_counted_in_the_metrics():
    hook, storage = _hook({"a.jpg", "b.jpg"}, 0.2)
    hook.after_step()
    assert storage.latest()["images_skipped"][0] == 2


def test_more_skipped_images_than_the_share_stop_the_run():
    hook, _ = _hook({"a.jpg", "b.jpg"}, 0.1)
    with pytest.raises(InputError, match="2 of 10 training images are unusable.*a.jpg, b.jpg"):
        hook.after_step()


def test_a_trainer_writes_nothing_before_it_trains(cfg):
    DetectionTrainer(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_a_checkpoint_without_optimizer_is_not_resumed_as_if_nothing_were_lost(cfg):
    trainer = DetectionTrainer(cfg)
    state = trainer.state_dict()
    del state["_trainer"]
    with pytest.raises(InputError, match="no optimizer state"):
        trainer.load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "name", "evaluator"),
    [
        ("coco", "unit_train", CocoEvaluator),
        ("lvis", "unit_lvis_v1", LvisEvaluator),
        ("pascal_voc", "unit_voc", VocEvaluator),
    ],
)
def test_the_evaluator_follows_the_data_sets_type(kind, name, evaluator, cfg, three_formats):
    metadata = MetadataCatalog.get(name)
    if kind == "lvis":
        metadata.set(json_file=str(three_formats / "annotations/lvis_v1_test.json"))
    if kind == "pascal_voc":
        folder = str(three_formats / "VOC")
        metadata.set(dirname=folder, split="test", year=2007, thing_classes=["circle"])
        cfg.MODEL.MASK_ON = False
    metadata.evaluator_type = kind
    cfg.DATASETS.TEST = (name,)
    assert type(build_evaluator(cfg, name)) is evaluator


def test_a_data_set_without_a_known_type_is_told(cfg):
    MetadataCatalog.get("unit_odd").evaluator_type = "cocoo"
    with pytest.raises(InputError, match="evaluator_type 'cocoo'.*Did you mean 'coco'"):
        build_evaluator(cfg, "unit_odd")


def test_records_survive_the_loaders_serialisation(cfg):
    records = build_train_loader(cfg).training_set.records
    assert isinstance(records, DatasetFromList)
    assert [record["index"] for record in records] == list(range(6))
