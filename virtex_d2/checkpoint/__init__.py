"""Backbone files -> detectors: whose tensors they are, and a load that leaves none behind."""
