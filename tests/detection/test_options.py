"""Keys that cannot be meant are refused before anything is built."""

import pytest
import torch

from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError

AMP = ("SOLVER.AMP.ENABLED", True)
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True)
EMA = ("VIRTEX.EMA.ENABLED", True)
AUG = ("TEST.AUG.ENABLED", True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((*AMP, "SOLVER.AMP.DTYPE", "float16"), "float16 needs a GPU. On a CPU use bfloat16"),
        ((*AMP, "SOLVER.AMP.DTYPE", "bfloat"), "is 'bfloat'.*Did you mean 'bfloat16'"),
        ((*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full"), "is 'full'.*one of value, norm, full"),
        (
            (*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
            "CLIP_VALUE is 0.0; expected a positive",
        ),
        ((*EMA, "VIRTEX.EMA.DECAY", 1.0), "VIRTEX.EMA.DECAY is 1.0; expected a number between"),
        ((*AUG, "MODEL.META_ARCHITECTURE", "RetinaNet"), "found MODEL.META_ARCHITECTURE RetinaNet"),
        ((*AUG, "MODEL.KEYPOINT_ON", True), "found MODEL.KEYPOINT_ON True"),
        ((*AUG, "TEST.AUG.MIN_SIZES", ()), "TEST.AUG.MIN_SIZES is empty"),
    ],
)
def test_it_is_told_which_key_and_what_is_possible(keys, message, detection_cfg):
    for key, value in zip(keys[::2], keys[1::2]):
        *groups, name = key.split(".")
        node = detection_cfg
        for group in groups:
            node = node[group]
        node[name] = value
    with pytest.raises(InputError, match=message):
        DetectionTrainer(detection_cfg)


def test_values_of_what_is_off_do_not_matter(detection_cfg):
    detection_cfg.SOLVER.AMP.DTYPE = "float16"
    detection_cfg.VIRTEX.EMA.DECAY = 2.0
    assert DetectionTrainer(detection_cfg).ema is None


def test_a_gpu_without_bfloat16_is_not_made_to_emulate_it(detection_cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    detection_cfg.MODEL.DEVICE, detection_cfg.SOLVER.AMP.ENABLED = "cuda", True
    with pytest.raises(InputError, match="Tesla V100 has no such arithmetic. Use float16"):
        DetectionTrainer(detection_cfg)
