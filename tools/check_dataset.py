#!/usr/bin/env python
"""Check a detection data set before training: annotations, image files, leakage; one page each.

python tools/check_dataset.py --train coco annotations/train.json images \\
    --val coco annotations/val.json images --contact-sheet sheet.png --output problems.csv

python tools/check_dataset.py --val voc datasets/VOC2007 test

python tools/check_dataset.py --config-file configs/coco/mask_rcnn_R_50_FPN_2x.yaml --no-images

python tools/check_dataset.py --words IIIT5K/traindata.mat --val-words IIIT5K/testdata.mat

A data set is the last three parts of an entry of VIRTEX.DATASETS: type (coco, lvis or voc),
annotation file (voc: folder), image folder (voc: split). With --config-file or KEY VALUE pairs the
data sets are those of DATASETS.TRAIN and DATASETS.TEST, and the detector is the config's; without,
it is one of boxes. Exit code: 0 no problems, and tools/train_net.py would start; 1 problems found;
2 bad usage. With several sets, a contact sheet is written for each: sheet-1.png, sheet-2.png, ...
"""

import sys

from pretrain.methods.seqclr.main import check_words
from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.studies.check_dataset.main import main

if __name__ == "__main__":
    of_words = any(word.startswith(("--words", "--val-words")) for word in sys.argv[1:])
    with exit_on_input_error():
        raise SystemExit(check_words(__doc__) if of_words else main(__doc__))
