"""What fine-tuning adds to detectron2's engine: one module for each thing that a config can ask."""
