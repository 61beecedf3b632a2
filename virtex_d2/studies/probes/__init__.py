"""What a backbone knows: linear classifiers on its frozen features, or fine-tuned with it."""
