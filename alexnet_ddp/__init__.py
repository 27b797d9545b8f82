"""Trains AlexNet, and any other image classifier, with DistributedDataParallel. Start reading at train.py."""

__version__ = "0.1.0"
