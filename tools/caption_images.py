#!/usr/bin/env python
"""Caption images with a pretrained model; a line each on standard output, in their order.

python tools/caption_images.py output/pretrain photo.jpg more_photos
python tools/caption_images.py output/pretrain photos --attention looks --decode greedy
find . -name '*.jpg' | python tools/caption_images.py output/pretrain - --format json
python tools/caption_images.py virtex.pth photo.jpg --config-file config.yaml --tokenizer coco.model

Exit codes: 0 all images are captioned; 1 some cannot be decoded (named on standard error); 2 the
model or an argument cannot be used.
"""

from pretrain.methods.captioning.main import caption_images
from virtex_d2.engine.cli import run_program

if __name__ == "__main__":
    run_program(caption_images, __doc__)
