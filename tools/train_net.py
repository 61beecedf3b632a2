#!/usr/bin/env python
"""Train or evaluate a detector.

python tools/train_net.py --config-file configs/coco/mask_rcnn_R_50_FPN_2x.yaml --num-gpus 8 \\
    MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/detector

Your own data, in COCO's format, without writing Python:

python tools/train_net.py --config-file configs/shapes/mask_rcnn_R_50_FPN.yaml \\
    VIRTEX.DATASETS "[['mine', 'coco', 'annotations/train.json', 'images']]" \\
    DATASETS.TRAIN "('mine',)" OUTPUT_DIR output/detector
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

import argparse

from virtex_d2.engine.cli import run_tool


def main(args: argparse.Namespace) -> None:
    from virtex_d2.detection.main import main as train_or_evaluate

    train_or_evaluate(args)


if __name__ == "__main__":
    run_tool(__doc__, main)
