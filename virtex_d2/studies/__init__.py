"""What is done with networks and data sets: comparisons, the demo, probes, pictures, checks."""
