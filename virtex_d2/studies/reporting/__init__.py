"""What reports are made of: metrics of runs, curves, and pages that open anywhere."""
