"""Histograms of the trained parameters and their gradients (logger.histograms_every_steps)."""

import torch
from torch import Tensor

from alexnet_ddp.parallel import ParallelModel
from alexnet_ddp.parallel.group import ShardedTensor
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.tracking.histograms import Histogram

NUM_BINS = 64


@torch.no_grad()
def histograms(parallel_model: ParallelModel, world: World) -> dict[str, Histogram]:
    """Collective if layers are sharded. parameters/NAME and gradients/NAME, of full tensors.

    Empty on other ranks than 0. Gradients are those of the last step, as they were applied.
    Tensors without finite values are left out. Waits for the device.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parallel_model.model.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameters/{name}"] = parameter
            if parameter.grad is not None:
                tensors[f"gradients/{name}"] = parameter.grad
    found = {}
    for name, tensor in parallel_model.sharded(tensors).items():
        full = tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor
        histogram = _histogram(full) if world.is_main else None
        if histogram is not None:
            found[name] = histogram
    return found


def _histogram(tensor: Tensor) -> Histogram | None:
    values = tensor.detach().float().flatten()
    values = values[values.isfinite()]
    if len(values) == 0:
        return None
    low, high = (float(end) for end in values.aminmax())
    # With equal ends, histc would choose others.
    counts = [len(values)] if low == high else values.histc(NUM_BINS, low, high).long().tolist()
    wide = values.double()
    return Histogram(low, high, counts, float(wide.sum()), float(wide.square().sum()))
