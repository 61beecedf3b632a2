#!/usr/bin/env python
"""Train or evaluate a detector.

python tools/train_net.py --config-file configs/shapes/mask_rcnn_R_50_FPN.yaml \
    MODEL.WEIGHTS output/backbone.safetensors OUTPUT_DIR output/detector \
    VIRTEX.DATASETS "[['train', 'coco', 'train.json', 'images']]" DATASETS.TRAIN "('train',)"
"""

import virtex_d2  # noqa: F401, I001 - before detectron2: bridges its versions

from detectron2.config import get_cfg

from virtex_d2.config import add_virtex_config
from virtex_d2.data.catalog import register_datasets
from virtex_d2.modeling import resolve_norms
from virtex_d2.runtime.config import load_config
from virtex_d2.runtime.errors import exit_on_input_error
from virtex_d2.runtime.launch import launch
from virtex_d2.runtime.setup import argument_parser, setup_run
from virtex_d2.trainer import DetectionTrainer


def main(args) -> None:
    cfg = get_cfg()
    add_virtex_config(cfg)
    load_config(cfg, args.config_file, args.opts)
    register_datasets(cfg)
    setup_run(cfg, args)
    resolve_norms(cfg)
    cfg.freeze()
    if args.eval_only:
        DetectionTrainer.evaluate_only(cfg, args.resume)
        return
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    with exit_on_input_error():
        launch(main, argument_parser(__doc__).parse_args())
