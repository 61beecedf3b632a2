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
import logging

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import exit_on_input_error


def main(args: argparse.Namespace) -> None:
    from virtex_d2.checkpoint.transfer import apply_preprocessing, open_weights
    from virtex_d2.detection.config import get_virtex_cfg
    from virtex_d2.detection.datasets import log_datasets, register_datasets
    from virtex_d2.detection.modeling import resolve_norms
    from virtex_d2.detection.resumed import may_change
    from virtex_d2.detection.trainer import DetectionTrainer
    from virtex_d2.engine.config import load_config
    from virtex_d2.engine.run import setup_run

    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
    weights = open_weights(cfg, args.resume)
    changes = apply_preprocessing(cfg, weights)
    datasets = register_datasets(cfg, args.eval_only)
    setup_run(cfg, args, may_change=may_change(cfg))
    for line in changes:
        logging.getLogger("virtex_d2").info(line)
    log_datasets(datasets)
    resolve_norms(cfg)
    cfg.freeze()
    if args.eval_only:
        DetectionTrainer.evaluate_only(cfg, args.resume, weights)
        return
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(args.resume, weights)
    del weights  # whose tensors are set
    trainer.train()


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.engine.distributed import launch
    from virtex_d2.engine.preemption import exit_at_once_if_unfinished

    with exit_on_input_error(), exit_at_once_if_unfinished():
        launch(main, arguments)
