"""Image sources: folders, ImageNet archives, shards, the demo and synthetic data."""
