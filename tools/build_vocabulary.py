#!/usr/bin/env python
"""Train a caption tokenizer (SentencePiece BPE), and say how well it fits the captions.

python tools/build_vocabulary.py --captions captions_train.json --images images/train \\
    --vocab-size 10000 --output tokenizer.model

The file goes into DATA.TOKENIZER. The same captions and size give the same bytes.
"""

from pretrain.methods.captioning.main import build_vocabulary
from virtex_d2.engine.cli import run_program

if __name__ == "__main__":
    run_program(build_vocabulary, __doc__)
