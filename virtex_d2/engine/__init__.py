"""What every run stands on: errors, files, config, launching, checkpoints, updates, bridges.

Imports nothing else of the project.
"""
