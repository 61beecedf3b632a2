#!/usr/bin/env python
"""Judge a backbone by classifiers on its features, or by fine-tuning it as a classifier.

python tools/linear_probe.py --config-file configs/probes/voc07_svm.yaml \\
    MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/voc07
python tools/linear_probe.py --config-file configs/probes/imagenet_linear.yaml --num-gpus 8 \\
    --resume MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/imagenet
python tools/linear_probe.py --config-file configs/probes/inaturalist_finetune.yaml --num-gpus 8 \\
    --resume MODEL.WEIGHTS random OUTPUT_DIR output/inaturalist

Results are in OUTPUT_DIR/results.json and per_class.csv. Where MODEL.WEIGHTS is the folder of a
pretraining, the SVMs judge each of its numbered checkpoints, and the curve is in metrics.json.
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

import argparse
import os

from virtex_d2.engine.cli import run_tool


def main(args: argparse.Namespace) -> None:
    from virtex_d2.engine.config import load_config
    from virtex_d2.studies.probes.config import get_probe_cfg
    from virtex_d2.studies.probes.folder import probe_folder
    from virtex_d2.studies.probes.run import run_probe

    cfg = load_config(get_probe_cfg(), args.config_file, args.opts, expand=not args.check)
    if not args.check:
        (probe_folder if os.path.isdir(cfg.MODEL.WEIGHTS) else run_probe)(cfg, args)


if __name__ == "__main__":
    run_tool(__doc__, main)
