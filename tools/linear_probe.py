#!/usr/bin/env python
"""Judge a backbone by classifiers on its features, or by fine-tuning it as a classifier.

python tools/linear_probe.py --config-file configs/probes/voc07_svm.yaml \\
    MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/voc07
python tools/linear_probe.py --config-file configs/probes/imagenet_linear.yaml --num-gpus 8 \\
    --resume MODEL.WEIGHTS output/pretrain/backbone.safetensors OUTPUT_DIR output/imagenet
python tools/linear_probe.py --config-file configs/probes/inaturalist_finetune.yaml --num-gpus 8 \\
    --resume MODEL.WEIGHTS random OUTPUT_DIR output/inaturalist

Results are in OUTPUT_DIR/results.json and per_class.csv.
"""

import argparse

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import exit_on_input_error


def main(args: argparse.Namespace) -> None:
    from virtex_d2.engine.config import load_config
    from virtex_d2.studies.probes.config import get_probe_cfg
    from virtex_d2.studies.probes.run import run_probe

    cfg = load_config(get_probe_cfg(), args.config_file, args.opts, expand=not args.check)
    if not args.check:
        run_probe(cfg, args)


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.engine.distributed import launch

    with exit_on_input_error():
        launch(main, arguments)
