#!/usr/bin/env python
"""Write a split of the synthetic captioned world, or a contact sheet of it.

python tools/make_shapes.py --output shapes --split train --num-images 1000 --size 128 --seed 1

How long that takes on one core (about 5 s): put `time taskset -c 0` before it.
"""

from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.studies.shapes.main import main

if __name__ == "__main__":
    with exit_on_input_error():
        main(__doc__)
