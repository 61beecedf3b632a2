#!/usr/bin/env python
"""Read the words in images: a line each on standard output, path, text and confidence by tabs.

python tools/read_words.py output/recognizer words > read.tsv
python tools/read_words.py recognizer.safetensors word.png

Exit codes: 0 all images are read; 1 some cannot be decoded (named on standard error); 2 the model
or an argument cannot be used.
"""

from pretrain.methods.seqclr.main import read_words
from virtex_d2.engine.cli import run_program

if __name__ == "__main__":
    run_program(read_words, __doc__)
