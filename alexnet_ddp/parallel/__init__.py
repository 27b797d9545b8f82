"""Training one model on all ranks: DistributedDataParallel, or a hybrid that shards linear layers.

The loss that is differentiated is a sum over images, scaled by world_size / (images of the global
batch). DDP's mean over the ranks is then the mean over the global batch, even if the ranks have
different numbers of images.
"""

from alexnet_ddp.parallel.build import build_parallel, check_parallel
from alexnet_ddp.parallel.group import ShardedTensor
from alexnet_ddp.parallel.hybrid import find_layers, worth_splitting
from alexnet_ddp.parallel.interface import CommHook, ParallelModel
from alexnet_ddp.parallel.modes import evaluation_mode

__all__ = [
    "CommHook",
    "ParallelModel",
    "ShardedTensor",
    "build_parallel",
    "check_parallel",
    "evaluation_mode",
    "find_layers",
    "worth_splitting",
]
