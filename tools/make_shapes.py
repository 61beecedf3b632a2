#!/usr/bin/env python
"""Write a split of the synthetic captioned world: virtex_d2/studies/shapes/main.py."""

from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.studies.shapes.main import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
