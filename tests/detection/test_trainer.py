"""The parts of fine-tuning that tools/train_net.py only shows from outside."""

import json
import logging
import types
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.hooks import SkippedImages


@pytest.fixture
def cfg(detection_cfg):
    return detection_cfg


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


_LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc", "total_loss"}


def test_losses_rate_times_and_throughput_are_reported_once_an_iteration(detection_cfg, caplog):
    cfg = detection_cfg
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.VIRTEX.ACCUMULATE = 6, 4, 2
    cfg.TEST.PRECISE_BN.ENABLED = False
    with caplog.at_level(logging.INFO):
        DetectionTrainer(cfg).train()
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    (line,) = [json.loads(line) for line in lines]
    assert line["iteration"] == 5
    expected = {*_LOSSES, "lr", "time", "data_time", "eta_seconds", "images_per_second"}
    assert expected <= line.keys()
    assert line["lr"] == cfg.SOLVER.BASE_LR
    parts = sum(line[name] for name in _LOSSES - {"total_loss"})
    assert line["total_loss"] == pytest.approx(parts, rel=0.2)  # medians over the iterations
    assert line["images_per_second"] == pytest.approx(4 / line["time"], rel=0.5)
    assert line["time"] > line["data_time"] > 0
    (progress,) = [r.getMessage() for r in caplog.records if "eta: " in r.getMessage()]
    assert all(f"{name}: " in progress for name in ("iter", "time", "data_time", "lr", *_LOSSES))
    events = EventAccumulator(cfg.OUTPUT_DIR)
    events.Reload()
    assert expected <= set(events.Tags()["scalars"])
    assert {event.step for event in events.Scalars("total_loss")} == {5}


def test_a_finished_run_evaluates_and_records_nothing_again(detection_cfg, caplog, monkeypatch):
    cfg = detection_cfg
    cfg.DATASETS.TEST, cfg.SOLVER.MAX_ITER, cfg.TEST.PRECISE_BN.ENABLED = ("unit_test",), 2, False
    cfg.VIRTEX.LOG_PERIOD = 1

    def train():
        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=True)
        return trainer.train()

    train()
    folder = Path(cfg.OUTPUT_DIR)
    before = sorted(path.name for path in folder.iterdir())
    records = (folder / "metrics.json").read_text()
    monkeypatch.setattr(DetectionTrainer, "test", lambda *_: pytest.fail("evaluated again"))
    with caplog.at_level(logging.INFO):
        assert train() is None
    assert "All 2 iterations are done and evaluated" in caplog.text
    assert "iter: " not in caplog.text.split("All 2 iterations")[1]
    assert (folder / "metrics.json").read_text() == records
    assert sorted({path.name for path in folder.iterdir()} - {"config.yaml"}) == before


def _first_update(cfg):
    """The weights' change and the metrics of one iteration."""
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR = 0.0, 1.0
    cfg.SOLVER.MAX_ITER, cfg.TEST.PRECISE_BN.ENABLED = 1, False
    seed_all_rng(0)
    trainer = DetectionTrainer(cfg)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with EventStorage() as trainer.storage:
        trainer.run_step()
    change = [q.detach() - p for p, q in zip(before, trainer.model.parameters())]
    return change, {name: value for name, (value, _) in trainer.storage.latest().items()}


def test_clipping_each_parameters_gradient_comes_from_the_config(detection_cfg):
    clip = detection_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "norm", 1e-3
    change, _ = _first_update(detection_cfg)
    norms = torch.stack([part.norm() for part in change])
    assert norms.max() == pytest.approx(1e-3, rel=0.01)
    assert norms.norm() > 5e-3  # all together: more than that


def test_clipping_all_gradients_together_keeps_their_direction(detection_cfg):
    free, _ = _first_update(detection_cfg)
    clip = detection_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 0.01
    change, metrics = _first_update(detection_cfg)
    # in float64: a float32 sum over millions of squares is wrong in its third digit
    whole, clipped = (
        torch.cat([part.flatten().double() for part in parts]) for parts in (free, change)
    )
    assert whole.norm() > 0.1
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.dot(whole, clipped) / whole.norm() / clipped.norm() > 0.9999
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_detector_trains_in_mixed_precision_on_a_gpu(dtype, detection_cfg):
    cfg = detection_cfg
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, dtype
    cfg.VIRTEX.ACCUMULATE = 2
    change, metrics = _first_update(cfg)
    assert all(part.isfinite().all() for part in change)
    assert ("grad_scale" in metrics) == (dtype == "float16")
    assert metrics["total_loss"] > 0


def test_random_starts_differ_in_the_last_norms_scales_alone(cfg, caplog):
    states = {}
    for start in ("", "random", "random_zero_scales"):
        cfg.MODEL.WEIGHTS = start
        seed_all_rng(3)
        trainer = DetectionTrainer(cfg)
        with caplog.at_level(logging.INFO):
            trainer.resume_or_load(resume=False)
        states[start] = trainer.model.state_dict()
    assert "random_zero_scales: random weights, scales of the residual blocks' last" in caplog.text
    ones, zeros = states["random"], states["random_zero_scales"]
    assert all(torch.equal(tensor, ones[name]) for name, tensor in states[""].items())
    differ = [name for name in ones if not torch.equal(ones[name], zeros[name])]
    expected = [
        f"res{stage}.{block}.conv2.norm.weight" for stage in range(2, 6) for block in (0, 1)
    ]
    assert differ == [f"backbone.bottom_up.{name}" for name in expected]
    assert all((ones[name] == 1).all() and not zeros[name].any() for name in differ)

    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with pytest.raises(InputError, match="frozen norms, whose scales would stay 0"):
        DetectionTrainer(cfg).resume_or_load(resume=False)


@pytest.mark.slow
@pytest.mark.slow
def test_the_backbone_is_trained_at_a_rate_of_its_own_and_so_again_when_resumed(cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_LR_FACTOR, cfg.SOLVER.MAX_ITER = 0.002, 0.1, 2
    cfg.VIRTEX.LOG_PERIOD = cfg.SOLVER.CHECKPOINT_PERIOD = 1
    trainer = DetectionTrainer(cfg)
    optimizer = trainer.optimizer
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values()), "each once"
    for name, rate in rates.items():
        # detectron2's own FPN lies in `backbone` too, and is none of the pretrained network
        assert rate == pytest.approx(0.0002 if ".bottom_up." in name else 0.002), name
    plain = cfg.clone()
    plain.SOLVER.BACKBONE_LR_FACTOR = 1.0
    decay = lambda opt: {  # noqa: E731
        names.get(id(p), i): group["weight_decay"]
        for group in opt.param_groups
        for i, p in enumerate(group["params"])
    }
    stock = DetectionTrainer.build_optimizer(plain, trainer.model)
    assert decay(optimizer) == decay(stock)

    trainer.resume_or_load(resume=False)
    trainer.train()
    text = Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["lr"], line["lr_backbone"]) for line in lines] == [
        (pytest.approx(0.002), pytest.approx(0.0002))
    ] * 2
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000000.pth")
    final = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)["model"]
    resumed = DetectionTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
    resumed.train()
    assert all(torch.equal(tensor, final[n]) for n, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("factor", [0.0, -0.1, float("nan"), float("inf")])
def test_a_backbone_rate_that_is_none_is_refused(cfg, factor):
    cfg.SOLVER.BACKBONE_LR_FACTOR = factor
    with pytest.raises(InputError, match="BACKBONE_LR_FACTOR is .*FREEZE_AT 5"):
        DetectionTrainer(cfg)


def test_a_backbone_rate_for_a_frozen_backbone_is_refused(cfg):
    cfg.SOLVER.BACKBONE_LR_FACTOR, cfg.MODEL.BACKBONE.FREEZE_AT = 0.1, 5
    with pytest.raises(InputError, match="nothing of the backbone is trained"):
        DetectionTrainer(cfg)
