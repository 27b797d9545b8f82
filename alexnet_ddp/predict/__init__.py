"""Classifies images with a trained network.

- command: the steps of a prediction; network: a run, an exported folder or a file of weights
- images: the paths that the option `images` names
- output: the formats of predictions; embeddings: the outputs of a layer, and their formats
"""
