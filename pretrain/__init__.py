"""Pretraining: images in, a network out. Knows no detector."""

import virtex_d2  # noqa: F401 - detectron2's engine needs its bridges before it is imported
