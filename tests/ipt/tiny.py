"""Runs of a network so small that tests can train it: patches of 12 pixels, one layer."""

from pathlib import Path

from pretrain.config import load_pretrain_config
from pretrain.trainer import PretrainTrainer

CONFIG = """\
MODEL: {{OBJECTIVE: ipt, DEVICE: cpu}}
DATA: {{FORMAT: images, TRAIN_IMAGES: {data}/train, VAL_IMAGES: {data}/val, NUM_WORKERS: 0}}
IPT: {{FEATURES: 4, PATCH_SIZE: 12, LAYERS: 1, HEADS: 2}}
SOLVER: {{OPTIMIZER: adamw, BASE_LR: 0.002, WEIGHT_DECAY: 0.0, IMS_PER_BATCH: 4, MAX_ITER: 6,
         WARMUP_ITERS: 0, CLIP_GRAD_NORM: 0.0, CHECKPOINT_PERIOD: 3, AMP: {{ENABLED: False}},
         LOOKAHEAD: {{ENABLED: False}}}}
TEST: {{IMS_PER_BATCH: 2, EVAL_PERIOD: 3, BEST_METRIC: val/psnr, NUM_CAPTIONS: 2}}
LOG_PERIOD: 1
"""


def tiny_config(folder: Path, images: Path, *more: str):
    """A config whose run writes to `folder`; `more`: KEY, VALUE, ..."""
    folder.mkdir(exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(CONFIG.format(data=images))
    return load_pretrain_config(str(file), ["OUTPUT_DIR", str(folder), *more])


def train_here(folder: Path, images: Path, *more: str) -> PretrainTrainer:
    trainer = PretrainTrainer(tiny_config(folder, images, *more))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer
