"""The parts of fine-tuning that tools/train_net.py only shows from outside."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.common import DatasetFromList
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils.events import EventStorage
from torch import nn

from virtex_d2.data.catalog import register_datasets
from virtex_d2.data.loader import ReplacingMapper, build_train_loader
from virtex_d2.evaluation import build_evaluator
from virtex_d2.runtime.errors import InputError
from virtex_d2.trainer import CPUAutocastTrainer, DetectionTrainer, SkippedImages


@pytest.fixture
def cfg(shapes_world, detector_config, tmp_path):
    """The config of a small detector on a copy of the small world."""
    world = Path(shutil.copytree(shapes_world, tmp_path / "world"))
    before = set(MetadataCatalog.list())
    cfg = detector_config("FPN", "MODEL.ROI_HEADS.NUM_CLASSES", -1)
    annotations = str(world / "annotations/instances_train.json")
    cfg.VIRTEX.DATASETS = [["unit_train", "coco", annotations, str(world / "images/train")]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("unit_train",), ()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    register_datasets(cfg)
    yield cfg
    for name in set(MetadataCatalog.list()) - before:
        MetadataCatalog.remove(name)
        DatasetCatalog.pop(name, None)


def _images(cfg):
    return sorted(Path(cfg.VIRTEX.DATASETS[0][3]).iterdir())


def test_the_next_readable_record_replaces_an_unusable_one(cfg):
    images = _images(cfg)
    for index in (4, 5):
        images[index].write_bytes(images[index].read_bytes()[:100])
    records = build_train_loader(cfg).records
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
    records = build_train_loader(cfg).records
    sample = ReplacingMapper(cfg, records)(dict(records[0]))
    (unusable,) = sample["unusable"]
    assert unusable[0] == records[0]["file_name"]
    assert "Mismatched image shape" in unusable[1]


class _Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.seen = []

    def forward(self, batch):
        output = self.layer(batch)
        self.seen.append(output.dtype)
        return {"loss": output.float().pow(2).mean()}


def test_autocast_on_a_cpu_computes_in_bfloat16_and_updates_float32_weights():
    torch.manual_seed(0)
    model = _Autocast()
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = CPUAutocastTrainer(model, [torch.randn(8, 4)], optimizer)
    with EventStorage() as storage:
        trainer.run_step()
    assert model.seen == [torch.bfloat16]
    assert model.layer.weight.dtype == model.layer.weight.grad.dtype == torch.float32
    assert not torch.equal(model.layer.weight, before)
    assert storage.latest()["total_loss"][0] > 0


def _hook(skipped, max_share, total=10):
    hook = SkippedImages(max_share)
    loader = types.SimpleNamespace(skipped=set(skipped), records=range(total))
    storage = EventStorage()
    hook.trainer = types.SimpleNamespace(iter=0, max_iter=5, data_loader=loader, storage=storage)
    return hook, storage


def test_skipped_images_are_counted_in_the_metrics():
    hook, storage = _hook({"a.jpg", "b.jpg"}, 0.2)
    hook.after_step()
    assert storage.latest()["images_skipped"][0] == 2


def test_more_skipped_images_than_the_share_stop_the_run():
    hook, _ = _hook({"a.jpg", "b.jpg"}, 0.1)
    with pytest.raises(InputError, match="2 of 10 training images are unusable.*a.jpg, b.jpg"):
        hook.after_step()


def test_precise_bn_replaces_the_running_statistics_before_the_checkpoint(cfg):
    cfg.SOLVER.MAX_ITER = 1
    statistics = {}
    for enabled in (True, False):
        cfg.TEST.PRECISE_BN.ENABLED = enabled
        torch.manual_seed(0)
        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]
        statistics[enabled] = saved["backbone.bottom_up.stem.conv1.norm.running_mean"]
        shutil.rmtree(cfg.OUTPUT_DIR)
    ratio = statistics[True].norm() / statistics[False].norm()
    assert ratio > 3  # one update with momentum 0.1 from zero against the statistics themselves


def test_a_trainer_writes_nothing_before_it_trains(cfg):
    DetectionTrainer(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_a_checkpoint_without_optimizer_is_not_resumed_as_if_nothing_were_lost(cfg):
    trainer = DetectionTrainer(cfg)
    state = trainer.state_dict()
    del state["_trainer"]
    with pytest.raises(InputError, match="no optimizer state"):
        trainer.load_state_dict(state)


def test_a_batch_that_the_processes_cannot_share_is_refused(cfg, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(InputError, match="IMS_PER_BATCH is 2, which 3 processes"):
        DetectionTrainer(cfg)


def test_gradient_clipping_comes_from_the_config(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-6
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.MAX_ITER, cfg.TEST.PRECISE_BN.ENABLED = 1, False
    torch.manual_seed(0)
    trainer = DetectionTrainer(cfg)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    change = max((p - q).norm() for p, q in zip(before, trainer.model.parameters()))
    assert 0 < change < 2e-6 * cfg.SOLVER.BASE_LR + 1e-7


@pytest.mark.parametrize(
    ("kind", "name", "evaluator"),
    [
        ("coco", "unit_train", COCOEvaluator),
        ("lvis", "unit_lvis_v1", LVISEvaluator),
        ("pascal_voc", "unit_voc", PascalVOCDetectionEvaluator),
    ],
)
def test_the_evaluator_follows_the_data_sets_type(kind, name, evaluator, cfg, tmp_path):
    metadata = MetadataCatalog.get(name)
    if kind == "lvis":
        from virtex_d2.data.shapes_write import write_dataset

        write_dataset(tmp_path / "lvis", "val", 2, size=64, formats=("lvis",))
        metadata.set(json_file=str(tmp_path / "lvis/annotations/lvis_v1_val.json"))
    if kind == "pascal_voc":
        metadata.set(dirname=str(tmp_path), split="test", year=2007, thing_classes=["circle"])
    metadata.evaluator_type = kind
    cfg.DATASETS.TEST = (name,)
    assert type(build_evaluator(cfg, name)) is evaluator


def test_a_data_set_without_a_known_type_is_told(cfg):
    MetadataCatalog.get("unit_odd").evaluator_type = "cocoo"
    with pytest.raises(InputError, match="evaluator_type 'cocoo'.*Did you mean 'coco'"):
        build_evaluator(cfg, "unit_odd")


def test_records_survive_the_loaders_serialisation(cfg):
    records = build_train_loader(cfg).records
    assert isinstance(records, DatasetFromList)
    assert [record["index"] for record in records] == list(range(6))
