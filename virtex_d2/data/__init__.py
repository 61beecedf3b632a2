"""Data sets for detectors, and a synthetic captioned world."""
