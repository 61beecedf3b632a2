#!/usr/bin/env python
"""Train the same detector from several initialisations, and report which is better by how much."""

from pathlib import Path

from virtex_d2.studies.compare.main import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1])
