"""What tools/train_net.py does in each process: train or evaluate a detector."""

import argparse
import logging

from virtex_d2.checkpoint.transfer import apply_preprocessing, open_weights
from virtex_d2.detection.config import get_virtex_cfg, may_change
from virtex_d2.detection.datasets import log_datasets, register_datasets
from virtex_d2.detection.modeling import resolve_norms
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.config import load_config
from virtex_d2.engine.run import setup_run


def main(args: argparse.Namespace) -> None:
    """Run what the command line, of `virtex_d2.engine.cli.argument_parser`, asks for."""
    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts, expand=not args.check)
    if args.check:
        return
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
