"""The moving average of the weights: what it is, where it is kept, what is evaluated."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from tests.conftest import THIN_BACKBONE
from tests.waits import Waits
from virtex_d2.checkpoint.source import read_backbone
from virtex_d2.detection.averages import WeightEMA
from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError

DECAY = 0.25  # at most (1 + n) / (10 + n), which is 3/12 at the second update


@pytest.fixture
def cfg(detection_cfg):
    """Three iterations of a detector that is averaged, and a test set."""
    detection_cfg.VIRTEX.EMA.ENABLED, detection_cfg.VIRTEX.EMA.DECAY = True, DECAY
    detection_cfg.DATASETS.TEST = ("unit_test",)
    detection_cfg.merge_from_list(THIN_BACKBONE.split())  # many checkpoints
    detection_cfg.SOLVER.MAX_ITER, detection_cfg.SOLVER.BASE_LR = 3, 0.02
    return detection_cfg


def _train(cfg, resume=False, kind=DetectionTrainer):
    seed_all_rng(0)
    trainer = kind(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def _file(cfg, name):
    return torch.load(Path(cfg.OUTPUT_DIR) / name, weights_only=True)


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_starts_at_the_first_weights_and_follows_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = WeightEMA(model, 0.3)
    weights, means = [], []
    for _ in range(6):
        nn.init.normal_(model[0].weight)
        model(torch.randn(8, 3))
        ema.update(model)
        weights.append(model[0].weight.detach().clone())
        means.append(model[1].running_mean.clone())
    for values, found in (
        (weights, ema.model[0].weight),
        (means, ema.model[1].running_mean),
    ):
        expected = values[0]
        for n, value in enumerate(values[1:], start=2):
            decay = min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(found, expected)
    assert ema.updates == 6
    assert ema.model[1].num_batches_tracked == 6
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_an_update_of_the_average_keeps_no_device_waiting():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema, waits = WeightEMA(model, 0.9), Waits()
    with waits:
        for _ in range(3):
            ema.update(model)
    assert waits.found == []
    assert ema.updates == 3


def test_a_run_with_an_average_trains_the_weights_of_one_without(cfg):
    averaged = _train(cfg)
    cfg.VIRTEX.EMA.ENABLED, cfg.OUTPUT_DIR = False, cfg.OUTPUT_DIR + "_without"
    plain = _train(cfg)
    assert _same(averaged.model.state_dict(), plain.model.state_dict())
    assert "ema" not in _file(cfg, "model_final.pth")


def test_checkpoints_hold_both_and_detectron2_reads_either(cfg, detector_config):
    trainer = _train(cfg)
    final, exported = _file(cfg, "model_final.pth"), _file(cfg, "model_ema.pth")
    assert final["ema"]["updates"] == 3
    assert _same(final["model"], trainer.model.state_dict())
    assert _same(final["ema"]["model"], trainer.ema.model.state_dict())
    assert _same(exported["model"], final["ema"]["model"])
    assert exported["virtex_d2"] == final["virtex_d2"]
    assert not _same(final["model"], exported["model"])
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"
    for name, expected in (("model_final", trainer.model), ("model_ema", trainer.ema.model)):
        model = build_model(cfg)
        DetectionCheckpointer(model).load(f"{cfg.OUTPUT_DIR}/{name}.pth")
        assert _same(model.state_dict(), expected.state_dict())
        path = f"{cfg.OUTPUT_DIR}/{name}.pth"
        stem = expected.state_dict()["backbone.bottom_up.stem.conv1.weight"]
        assert torch.equal(read_backbone(path).tensors["conv1.weight"], stem)
    averaged = read_backbone(f"{cfg.OUTPUT_DIR}/model_final.pth", copy="ema").tensors
    assert torch.equal(averaged["conv1.weight"], stem)


@pytest.mark.parametrize("precise", [False, True])
def test_a_resumed_run_ends_with_the_average_of_one_that_never_stopped(cfg, precise):
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.VIRTEX.ACCUMULATE = 4, 2
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "full_model", 1.0
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.EVAL_PERIOD = precise, 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    whole = cfg.OUTPUT_DIR
    _train(cfg)
    expected = _file(cfg, "model_final.pth")
    stopped = Path(whole + "_stopped")
    stopped.mkdir()
    (Path(whole) / "model_0000001.pth").rename(stopped / "model_0000001.pth")
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    cfg.OUTPUT_DIR = str(stopped)
    _train(cfg, resume=True)
    found = _file(cfg, "model_final.pth")
    assert found["ema"]["updates"] == expected["ema"]["updates"] == 4
    assert _same(found["model"], expected["model"])
    assert _same(found["ema"]["model"], expected["ema"]["model"])
    momenta = [
        {
            str(k): s["momentum_buffer"]
            for k, s in f["trainer"]["_trainer"]["optimizer"]["state"].items()
        }
        for f in (found, expected)
    ]
    assert _same(*momenta)


def test_switching_the_average_on_or_off_when_resuming_is_told(cfg, caplog):
    cfg.DATASETS.TEST = ()
    _train(cfg)
    cfg.SOLVER.MAX_ITER, cfg.VIRTEX.EMA.ENABLED = 4, False
    _train(cfg, resume=True)
    assert "holds an average of the weights, which this run drops" in caplog.text
    caplog.clear()
    cfg.SOLVER.MAX_ITER, cfg.VIRTEX.EMA.ENABLED = 5, True
    trainer = _train(cfg, resume=True)
    assert "the checkpoint holds no average, which starts with iteration 4" in caplog.text
    assert trainer.ema.updates == 1
    assert torch.equal(
        trainer.ema.model.backbone.bottom_up.stem.conv1.weight,
        trainer.model.backbone.bottom_up.stem.conv1.weight,
    )


@pytest.mark.parametrize("evaluate", [True, False])
def test_what_is_evaluated_is_what_the_config_says_and_logged(evaluate, cfg, caplog, monkeypatch):
    evaluated = []

    def test(cls, cfg, model, evaluators=None):
        evaluated.append(copy.deepcopy(model.state_dict()))
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(DetectionTrainer, "test", classmethod(test))
    cfg.VIRTEX.EMA.EVALUATE = evaluate
    with caplog.at_level(logging.INFO):
        trainer = _train(cfg)
        told = "is the moving average of the weights over 3 updates"
        assert (told in caplog.text) == evaluate
        assert ("are the weights themselves, not the moving" in caplog.text) == (not evaluate)
        expected = trainer.ema.model if evaluate else trainer.model
        assert _same(evaluated.pop(), expected.state_dict())
        # And with --eval-only, from either file and from the output folder.
        names = ["model_final.pth"] + ["model_ema.pth"] * evaluate
        for name in names:
            cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/{name}"
            DetectionTrainer.evaluate_only(cfg)
            assert _same(evaluated.pop(), expected.state_dict())
        cfg.MODEL.WEIGHTS = ""
        caplog.clear()
        DetectionTrainer.evaluate_only(cfg, resume=True)
    assert _same(evaluated.pop(), expected.state_dict())
    assert ("is the moving average of the checkpoint's weights" in caplog.text) == evaluate
    assert "drops" not in caplog.text


def test_an_average_that_the_file_does_not_hold_is_not_evaluated(cfg):
    model = build_model(cfg)
    checkpointer = DetectorCheckpointer(model, cfg.OUTPUT_DIR)
    Path(cfg.OUTPUT_DIR).mkdir()
    checkpointer.save("plain")
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/plain.pth"
    with pytest.raises(InputError, match="plain.pth: holds no average.*VIRTEX.EMA.EVALUATE False"):
        DetectionTrainer.evaluate_only(cfg)


def test_the_average_takes_in_every_update_in_mixed_precision_and_passes(cfg):
    cfg.SOLVER.AMP.ENABLED, cfg.VIRTEX.ACCUMULATE, cfg.VIRTEX.CHANNELS_LAST = True, 2, True
    trainer = DetectionTrainer(cfg)
    weight = trainer.model.backbone.bottom_up.stem.conv1.weight
    expected = None
    hook = next(hook for hook in trainer._hooks if type(hook).__name__ == "UpdateEMA")
    with EventStorage() as trainer.storage:
        for n in (1, 2, 3):
            trainer.run_step()
            hook.after_step()
            now = weight.detach().clone()
            expected = now if n == 1 else DECAY * expected + (1 - DECAY) * now
    averaged = trainer.ema.model.backbone.bottom_up.stem.conv1.weight
    torch.testing.assert_close(averaged, expected)
    assert averaged.dtype == torch.float32
    assert averaged.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(averaged, weight)
