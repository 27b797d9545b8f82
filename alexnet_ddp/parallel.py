"""How replicas stay equal: DistributedDataParallel.

The loss that is differentiated is a sum over images times world_size / (images of the global batch), so that DDP's mean
over the ranks is the mean over the global batch, however uneven the slices are.
"""

import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.config import DDPConfig, ParallelConfig
from alexnet_ddp.distributed import World

# torch 2.14 renamed the option that copies rank 0's buffers before each forward pass.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


def build_parallel(cfg: ParallelConfig, model: nn.Module, world: World) -> DistributedDataParallel:
    """Wrap `model`; rank 0's parameters and buffers go to all ranks. Later, buffers are ours to average (engine.py)."""
    match cfg:
        case DDPConfig():
            ids = [world.device.index] if world.device.type == "cuda" else None
            return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})
    raise TypeError(f"no parallelism for {type(cfg).__name__}")


def settle_buckets(ddp_model: DistributedDataParallel, image: torch.Tensor) -> None:
    """Collective. One backward pass without effect, before the first step of a process.

    DDP lays out its buckets anew at the forward pass that follows its first backward pass, and a sum over three or more
    ranks depends on the layout. A run that is resumed has to add in the order in which the undisturbed run does.
    """
    nothing_to_learn(ddp_model, image).backward()
    ddp_model.zero_grad(set_to_none=True)


def nothing_to_learn(ddp_model: DistributedDataParallel, image: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is zero: what a rank without images contributes. Statistics and dropout stay untouched.

    image: float [1, 3, size, size], of zeros.
    """
    ddp_model.eval()
    loss = ddp_model(image).sum() * 0.0
    ddp_model.train()
    return loss
