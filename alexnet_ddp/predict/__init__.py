"""Classifies images with a trained run.

- command: the steps of a prediction; images: the paths that the option `images` names
- output: the formats of predictions; embeddings: the outputs of a layer, and their formats
"""
