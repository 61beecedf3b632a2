#!/usr/bin/env python
"""The whole line on a synthetic captioned world: captions in, detector out, and a report."""

from pathlib import Path

from virtex_d2.studies.demo.main import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1])
