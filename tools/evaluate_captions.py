#!/usr/bin/env python
"""Score captions against references: BLEU, ROUGE-L, CIDEr, METEOR, SPICE.

python tools/caption_images.py output/pretrain images/val --format json > captions.jsonl
python tools/evaluate_captions.py captions.jsonl annotations/captions_val.json

PREDICTIONS are those lines, or COCO results: [{"image_id": 1, "caption": "a cat"}, ...]. Needs
requirements-captions.txt; METEOR, SPICE and COCO's own tokenizer need Java, and SPICE at its first
use the internet. What cannot be computed is named.
"""

from pretrain.methods.captioning.main import evaluate_captions
from virtex_d2.engine.cli import run_program

if __name__ == "__main__":
    run_program(evaluate_captions, __doc__)
