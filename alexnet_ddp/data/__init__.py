"""The data pipeline: from bytes on disk to batches on the device.

sources/ opens the images of a data set. sampler.py decides which images each rank uses in each
step. augment.py draws their augmentation. decode.py, policy.py and fill.py turn bytes into pixels,
in the threads of prefetch.py. loader.py copies batches to the device, and effects.py modifies them
there. Only loader.py, effects.py and features.py import torch at import time.
"""
