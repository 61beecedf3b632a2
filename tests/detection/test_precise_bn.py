"""Precise statistics: of which models, from how many images, and without a trace in training."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from torch import nn

from virtex_d2.detection.averages import PreciseBN
from virtex_d2.detection.loader import build_train_loader
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine import stopping
from virtex_d2.engine.randomness import own_randomness


@pytest.fixture
def cfg(detection_cfg):
    detection_cfg.TEST.PRECISE_BN.ENABLED = True
    return detection_cfg


def _train(cfg):
    seed_all_rng(0)
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    shutil.rmtree(cfg.OUTPUT_DIR)
    return saved


_MEAN = "backbone.bottom_up.stem.conv1.norm.running_mean"


def _weights(state):
    return {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}


def test_they_replace_the_running_statistics_before_the_checkpoint(cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 1, 6  # the world's images, all of them
    precise = _train(cfg)["model"][_MEAN]
    cfg.TEST.PRECISE_BN.ENABLED = False
    running = _train(cfg)["model"][_MEAN]
    # one update with momentum 0.1 from zero against the statistics themselves
    assert precise.norm() / running.norm() > 3


@pytest.mark.parametrize("evaluates", [False, True])
def test_training_does_not_notice_them_nor_the_evaluation(evaluates, cfg):
    """In one process, where loaders, augmentation and sampling share their generators."""
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 4, 1
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 56, 64)
    cfg.DATASETS.TEST = ("unit_test",) if evaluates else ()
    measured = _train(cfg)["model"]
    cfg.TEST.PRECISE_BN.ENABLED, cfg.DATASETS.TEST = False, ()
    plain = _train(cfg)["model"]
    assert not torch.equal(measured[_MEAN], plain[_MEAN])
    expected = _weights(plain)
    assert len(expected) > 100
    assert all(torch.equal(value, measured[name]) for name, value in expected.items())


def test_the_average_of_the_weights_gets_its_own(cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 3, 0.05
    cfg.VIRTEX.EMA.ENABLED, cfg.VIRTEX.EMA.DECAY = True, 0.2
    cfg.TEST.PRECISE_BN.NUM_ITER = 3
    seed_all_rng(0)
    trainer = DetectionTrainer(cfg)
    trainer.train()
    for model in (trainer.model, trainer.ema.model):
        expected = copy.deepcopy(model)
        before = expected.state_dict()[_MEAN].clone()
        nn.init.zeros_(expected.backbone.bottom_up.stem.conv1.norm.running_mean)
        loader = lambda: build_train_loader(cfg, trainer.data_loader.training_set)  # noqa: E731
        hook = PreciseBN(0, {"copy": expected}, loader, 3, cfg.SEED)
        hook.trainer = type("Trainer", (), {"iter": 2})
        hook.update()
        state = model.state_dict()
        assert torch.equal(expected.state_dict()[_MEAN], before)
        assert all(torch.equal(value, state[name]) for name, value in _statistics(expected).items())
    means = [_statistics(model) for model in (trainer.model, trainer.ema.model)]
    deep = "backbone.bottom_up.res5.1.conv2.norm.running_mean"
    assert not torch.equal(means[0][deep], means[1][deep])


def _statistics(model):
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def test_with_accumulation_they_see_the_passes_batches_and_as_many_images(cfg, monkeypatch):
    sizes = []
    cfg.SOLVER.IMS_PER_BATCH, cfg.VIRTEX.ACCUMULATE = 6, 3
    cfg.TEST.PRECISE_BN.NUM_ITER, cfg.SOLVER.MAX_ITER = 2, 1
    trainer = DetectionTrainer(cfg)
    trainer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trainer.train()
    assert sizes == [2] * 3 + [2] * 6  # three passes of training, then twice as many


def test_more_batches_than_the_images_give_go_through_them_again(cfg):
    cfg.TEST.PRECISE_BN.NUM_ITER, cfg.SOLVER.MAX_ITER = 10, 1  # 20 of 6 images
    assert _train(cfg)["model"][_MEAN].isfinite().all()


def test_a_model_without_trained_batch_norm_is_left_alone(cfg, caplog):
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = "FrozenBN", ""
    cfg.SOLVER.MAX_ITER = 1
    with caplog.at_level("INFO"):
        trainer = DetectionTrainer(cfg)
    assert "no batch norm that is trained" in caplog.text
    assert not any(isinstance(hook, PreciseBN) for hook in trainer._hooks)
    before = trainer.model.state_dict()[_MEAN].clone()
    trainer.train()
    assert torch.equal(trainer.model.state_dict()[_MEAN], before)


def test_own_randomness_depends_on_seed_and_iteration_and_leaves_no_trace():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    inside = {}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = [draw(), draw()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    found = [draw()]
    for key in ((1, 0), (1, 1), (2, 0), (1, 0)):
        with own_randomness(*key):
            drawn = draw()
        assert inside.setdefault(key, drawn) == drawn
    with pytest.raises(ZeroDivisionError), own_randomness(1, 0):
        raise ZeroDivisionError(draw())
    found.append(draw())
    assert found == expected
    assert len({value for values in inside.values() for value in values}) == 9


class _Batches:
    """Endless; with the second one STOP is there."""

    def __init__(self, stop_file=None):
        self._stop_file = stop_file

    def __iter__(self):
        for number in itertools.count(1):
            if number == 2 and self._stop_file:
                self._stop_file.touch()
            yield torch.arange(8.0).reshape(4, 2) * number / 3


def _measure(model, stop_file=None):
    hook = PreciseBN(0, {"model": model}, lambda: _Batches(stop_file), 3, 0)
    hook.trainer = type("Trainer", (), {"iter": 2})
    hook.update()
    return copy.deepcopy(model.state_dict())


def _same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _small_model():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model(torch.ones(4, 2))
    return model


def test_measuring_twice_is_measuring_once():
    """A resumed run repeats what the stopped one had begun; counters must not count twice."""
    model = _small_model()
    once = _measure(model)
    assert not _same(once, _small_model().state_dict())
    assert _same(once, _measure(model))


class _AcrossProcesses(nn.BatchNorm1d):
    """Updates its statistics as detectron2's NaiveSyncBatchNorm does where there are several."""

    def forward(self, x):
        with torch.no_grad():
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
        return (x - mean) / (var + self.eps).sqrt()


def test_what_was_there_before_does_not_change_what_is_measured():
    """Not by a rounding either: a run that was stopped while it evaluated ended a bit beside."""
    model = nn.Sequential(_AcrossProcesses(2))
    measured = []
    for value in (1.0, 12345.678):
        for name in ("running_mean", "running_var"):
            getattr(model[0], name).fill_(value)
        measured.append(_measure(model))
    assert _same(*measured)
    assert not torch.equal(measured[0]["0.running_mean"], torch.zeros(2))


def test_a_stop_while_they_are_measured_leaves_them_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "STOP_FILE_PERIOD", 0.0)
    monkeypatch.setattr(stopping, "_watch", None)
    stopping.watch(str(tmp_path))
    model = _small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(stopping.StopRequested):
        _measure(model, tmp_path / "STOP")
    assert _same(before, model.state_dict())
