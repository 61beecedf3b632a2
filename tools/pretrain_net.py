#!/usr/bin/env python
"""Pretrain a ResNet on captions; writes OUTPUT_DIR/backbone.safetensors.

python tools/pretrain_net.py --config-file configs/pretrain/bicaptioning_R_50_L1_H1024.yaml \\
    DATA.TRAIN_CAPTIONS captions.json DATA.TRAIN_IMAGES images OUTPUT_DIR output
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

import argparse

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import exit_on_input_error


def main(args: argparse.Namespace) -> None:
    from pretrain.config import get_pretrain_cfg
    from pretrain.trainer import PretrainTrainer
    from virtex_d2.engine.config import load_config
    from virtex_d2.engine.run import setup_run

    cfg = load_config(get_pretrain_cfg(), args.config_file, args.opts, expand=not args.check)
    if args.check:
        return
    setup_run(cfg, args)
    trainer = PretrainTrainer(cfg, with_training_data=not args.eval_only)
    if args.eval_only:
        trainer.load_for_evaluation()
        trainer.evaluate()
    else:
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.engine.distributed import launch
    from virtex_d2.engine.stopping import exit_at_once_if_unfinished

    with exit_on_input_error(), exit_at_once_if_unfinished():
        launch(main, arguments)
