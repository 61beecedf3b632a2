#!/usr/bin/env python
"""Train a recogniser of words, CTC or attention, on a frozen or fine-tuned encoder; or score one.

python tools/train_recognizer.py --config-file configs/recognition/scene_ctc_R_50.yaml \\
    DATA.WORDS "['train.txt']" DATA.VAL_WORDS "['test.txt']" \\
    ENCODER.WEIGHTS output/seqclr/encoder.safetensors OUTPUT_DIR output/recognizer
python tools/train_recognizer.py --eval-only --config-file output/recognizer/config.yaml \\
    OUTPUT_DIR output/recognizer DATA.VAL_WORDS "['IIIT5K/testdata.mat', 'evaluation']"

Each validation writes OUTPUT_DIR/predictions.tsv and scores.json; recognizer.safetensors is what
tools/read_words.py takes. docs/seqclr.md has the layouts of sets, and all keys.
"""

import virtex_d2.engine.listening  # noqa: F401 - first: main's imports take seconds

# isort: split

from pretrain.methods.seqclr.main import train_recognizer
from virtex_d2.engine.cli import run_tool

if __name__ == "__main__":
    run_tool(__doc__, train_recognizer)
