#!/usr/bin/env python
"""Prepare a folder of images once, so that every epoch loads them faster.

python tools/prepare_images.py --images train2017 --output train2017_320 --workers 8

Larger images become upright RGB with a shorter side of 320 pixels, and their JPEGs get a restart
marker after each block, between which the loader decodes only what a crop needs. Smaller ones are
copied as they are. Names stay, so that annotation files keep working: give the new folder as
DATA.TRAIN_IMAGES.

A run that was stopped or killed goes on with the same command. Images that cannot be decoded are
named and left out; the exit code is then 1.
"""

from pretrain.data.main import main

if __name__ == "__main__":
    raise SystemExit(main(__doc__))
