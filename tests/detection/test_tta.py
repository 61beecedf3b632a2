"""Test-time augmentation: the boxes are those of the images, and the results have their names."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model

from virtex_d2.detection.loader import TestLoader
from virtex_d2.detection.trainer import DetectionTrainer


@pytest.fixture(params=["FPN", "C4"])
def detector(request, detection_cfg, detector_config):
    """A random detector, its config and a test image; boxes are apart, so that none is merged."""
    cfg = detector_config(request.param)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("unit_train",), ("unit_test",)
    cfg.INPUT.MIN_SIZE_TEST = 96  # the images have 64 px
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.3
    # Not normalised: channels in another order would give other boxes.
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [200.0, 100.0, 0.0], [20.0, 60.0, 120.0]
    torch.manual_seed(0)
    model = build_model(cfg)
    for batch in TestLoader(cfg, "unit_test"):  # statistics of norms that are not all 0 and 1
        model.train()
        with torch.no_grad():
            model.backbone(model.preprocess_image(batch).tensor)
    return model.eval(), cfg, batch


def _augmented(cfg, sizes, flip=False):
    cfg = cfg.clone()
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = True, sizes, flip
    return cfg


@torch.no_grad()
def test_without_an_augmentation_it_detects_what_the_detector_detects(detector):
    model, cfg, batch = detector
    (expected,) = model(copy.deepcopy(batch))
    (found,) = GeneralizedRCNNWithTTA(_augmented(cfg, (96,)), model)(copy.deepcopy(batch))
    expected, found = expected["instances"], found["instances"]
    assert len(found) == len(expected) > 1
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    assert found.pred_masks.any()
    # The channels are as they are in training: others would give other scores.
    batch[0]["image"] = batch[0]["image"].flip(0)
    (swapped,) = GeneralizedRCNNWithTTA(_augmented(cfg, (96,)), model)(batch)
    assert len(swapped["instances"]) != len(expected) or not torch.allclose(
        swapped["instances"].scores, expected.scores, rtol=1e-3
    )


@torch.no_grad()
def test_from_a_flipped_image_boxes_and_masks_come_back_in_place(detector):
    """The detector of a mirrored image, mirrored, is what the flip alone must give."""
    model, cfg, batch = detector
    tta = GeneralizedRCNNWithTTA(_augmented(cfg, (96,), flip=True), model)
    only_flipped = copy.deepcopy(tta.tta_mapper)
    tta.tta_mapper = lambda sample: only_flipped(sample)[1:]
    (found,) = tta(copy.deepcopy(batch))
    batch[0]["image"] = batch[0]["image"].flip(2)
    (mirrored,) = model(batch)
    found, mirrored = found["instances"], mirrored["instances"]
    width = found.image_size[1]
    boxes = mirrored.pred_boxes.tensor.clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)
    agreement = (found.pred_masks == mirrored.pred_masks.flip(2)).float().mean()
    assert agreement > 0.99


@torch.no_grad()
def test_detections_of_all_sizes_are_merged(detector):
    model, cfg, batch = detector
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1000, 1.0  # all of them

    def scores(*sizes):
        # One image at a time: the smaller ones of a batch are padded, and differ a little.
        tta = GeneralizedRCNNWithTTA(_augmented(cfg, sizes), model, batch_size=1)
        (found,) = tta(copy.deepcopy(batch))
        return found["instances"].scores.sort().values

    one, other = scores(64), scores(128)
    assert not torch.equal(one, other)
    torch.testing.assert_close(scores(64, 128), torch.cat([one, other]).sort().values)


@torch.no_grad()
def test_where_nothing_is_detected_the_result_is_empty(detector):
    model, cfg, batch = detector
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    (found,) = GeneralizedRCNNWithTTA(_augmented(cfg, (64, 96), flip=True), model)(batch)
    assert len(found["instances"]) == 0


def test_it_is_evaluated_in_addition_after_training_and_alone(detection_cfg, caplog):
    cfg = detection_cfg
    cfg.DATASETS.TEST = ("unit_test",)
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 4, 2
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = True, (48, 64)
    cfg.VIRTEX.EMA.ENABLED = True
    torch.manual_seed(0)
    trainer = DetectionTrainer(cfg)
    with caplog.at_level(logging.INFO):
        trainer.train()
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert len([line for line in lines if "bbox/AP" in line]) == 2
    (augmented,) = [line for line in lines if "bbox_TTA/AP" in line]
    assert augmented == lines[-1]
    assert {"segm_TTA/AP50", "segm/AP50", "bbox_TTA/AP75"} <= augmented.keys()
    assert caplog.text.count("is the moving average of the weights over 4 updates") == 2
    for folder in ("inference", "inference_TTA"):
        assert (Path(cfg.OUTPUT_DIR) / folder / "coco_instances_results.json").is_file()
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    results = DetectionTrainer.evaluate_only(cfg)
    assert list(results) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    assert results["bbox_TTA"]["AP"] == pytest.approx(augmented["bbox_TTA/AP"], nan_ok=True)
