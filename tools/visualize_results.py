#!/usr/bin/env python
"""Draw predictions beside the truth: virtex_d2/studies/viewer/main.py."""

from virtex_d2.engine.errors import exit_on_input_error
from virtex_d2.studies.viewer.main import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
