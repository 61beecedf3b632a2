#!/usr/bin/env python
"""Restore images with a network of IPT: enlarge them, take noise or rain out of them.

python tools/restore_images.py IPT_sr4.pt photos enlarged
python tools/restore_images.py output/ipt rainy dry --task derain --reference clean
python tools/restore_images.py IPT_denoise30.pt CBSD68 restored --degrade --pictures compared
python tools/restore_images.py IPT_sr2.pt benchmark/Set5 restored --reference benchmark/Set5

Writes a PNG for each image, under its name, and with clean images a table and OUT/scores.json.
What is stopped goes on with --keep.

Exit codes: 0 all images are restored; 2 the checkpoint, an image or an argument cannot be used (all
are looked at before the first is restored); 1 anything else.
"""

from pretrain.methods.ipt.main import restore_images
from virtex_d2.engine.cli import run_program

if __name__ == "__main__":
    run_program(restore_images, __doc__)
