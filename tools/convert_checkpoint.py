#!/usr/bin/env python
"""Take the ResNet out of a checkpoint of any known layout, and write it for other programs.

python tools/convert_checkpoint.py moco_v2_800ep.pth.tar --inspect
python tools/convert_checkpoint.py moco_v2_800ep.pth.tar R-50.pkl --to detectron2 --verify
python tools/convert_checkpoint.py output/detector/model_final.pth resnet50.pth --to torchvision

Exit codes: 0 done; 2 the source or an argument cannot be used, and nothing is written, or --verify
found a difference; 1 anything else.
"""

from virtex_d2.checkpoint.main import main
from virtex_d2.engine.errors import exit_on_input_error

if __name__ == "__main__":
    with exit_on_input_error():
        main(__doc__)
