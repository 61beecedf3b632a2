"""What a run reports: metrics.json, TensorBoard and the log, as detectron2's users expect."""

import json
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from virtex_d2.detection.trainer import DetectionTrainer

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
