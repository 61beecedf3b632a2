#!/usr/bin/env python
"""Pretrain a network, by captions or another method; writes OUTPUT_DIR/backbone.safetensors.

python tools/pretrain_net.py --config-file configs/pretrain/bicaptioning_R_50_L1_H1024.yaml \\
    DATA.TRAIN_CAPTIONS captions.json DATA.TRAIN_IMAGES images OUTPUT_DIR output
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

from functools import partial

from pretrain.main import main
from virtex_d2.engine.cli import run_tool
from virtex_d2.studies.probes.during import build_probe

if __name__ == "__main__":
    run_tool(__doc__, partial(main, build_probe=build_probe))
