#!/usr/bin/env python
"""Pretrain a network, by captions or another method; writes OUTPUT_DIR/backbone.safetensors.

python tools/pretrain_net.py --config-file configs/pretrain/bicaptioning_R_50_L1_H1024.yaml \\
    DATA.TRAIN_CAPTIONS captions.json DATA.TRAIN_IMAGES images OUTPUT_DIR output
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

from pretrain.main import main
from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import exit_on_input_error

if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    # after parsing: --help and a mistyped flag need not wait for torch
    from virtex_d2.engine.distributed import launch
    from virtex_d2.engine.stopping import exit_at_once_if_unfinished

    with exit_on_input_error(), exit_at_once_if_unfinished():
        launch(main, arguments)
