"""The command `tools/pretrain_net.py`: pretrain, resume or evaluate what a config describes."""

import argparse
from collections.abc import Callable


def main(args: argparse.Namespace, build_probe: Callable | None = None) -> None:
    """Run in each process.

    Args:
        args: of `virtex_d2.engine.cli.argument_parser`.
        build_probe: of `PretrainTrainer`.
    """
    from pretrain.config import load_pretrain_config
    from pretrain.trainer import PretrainTrainer
    from virtex_d2.engine.run import setup_run

    cfg = load_pretrain_config(args.config_file, args.opts, expand=not args.check)
    if args.check:
        return
    setup_run(cfg, args)
    trainer = PretrainTrainer(cfg, with_training_data=not args.eval_only, build_probe=build_probe)
    if args.eval_only:
        trainer.load_for_evaluation()
        trainer.evaluate()
    else:
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
