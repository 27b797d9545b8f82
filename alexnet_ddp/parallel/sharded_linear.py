"""Linear layers that are sharded over a group of ranks (Krizhevsky 2014, "One weird trick").

Each rank passes in the features of its own images and receives their logits. Between the first and
the last sharded layer, each rank computes its shard of the units for the images of all ranks:

- The features are all-gathered. The first layer is sharded by columns: its output units.
- The other layers are sharded by rows: their input units. Their outputs are partial sums, which are
  reduce-scattered: to the rank that has the unit, or, in the last layer, to the rank that has the
  image.

Gradients: outside these layers the loss contains a factor world_size, which DDP's mean removes.
DDP ignores the sharded parameters, so the last layer removes the factor in its backward pass and
the first layer restores it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from alexnet_ddp.parallel.group import Group, Shard


class ColumnLinear(nn.Module):
    """The first sharded layer. weight: [units of this rank, inputs]."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, full: nn.Linear, group: Group) -> None:
        super().__init__()
        self.group = group
        self.shards = {"weight": Shard(0, full.weight.shape, group)}
        if full.bias is not None:
            self.shards["bias"] = Shard(0, full.bias.shape, group)
        _copy_parameters(self, full)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x: [n, inputs] of this rank's images -> [size * max_images, units of this rank]."""
        x, weight, bias = _autocast(x, self.weight, self.bias)
        return _GatherImages.apply(x, weight, bias, self.group)


class RowLinear(nn.Module):
    """A later sharded layer. weight: [outputs, inputs of this rank]."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, full: nn.Linear, group: Group, is_last: bool) -> None:
        """is_last: the outputs return to the ranks that have the images."""
        super().__init__()
        self.group, self.is_last = group, is_last
        self.shards = {"weight": Shard(1, full.weight.shape, group)}
        if full.bias is not None and not is_last:
            self.shards["bias"] = Shard(0, full.bias.shape, group)
        self.outputs = Shard(0, full.weight.shape, group)
        _copy_parameters(self, full)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x: [size * max_images, inputs of this rank].

        Returns [size * max_images, outputs of this rank]; the last layer returns [n, outputs] of
        this rank's images.
        """
        x, weight, bias = _autocast(x, self.weight, self.bias)
        if self.is_last:
            logits = _ScatterImages.apply(x, weight, self.group)[: self.group.num_images]
            return logits if bias is None else logits + bias
        out = _ScatterUnits.apply(x, weight, self.outputs)
        # Not a view: the next module may work in place.
        return out.clone() if bias is None else out + bias


def _copy_parameters(module: ColumnLinear | RowLinear, full: nn.Linear) -> None:
    """Register this rank's shards of the parameters; parameters without a shard stay full."""
    for name in ("weight", "bias"):
        value = getattr(full, name)
        if value is not None and name in module.shards:
            value = nn.Parameter(module.shards[name].of(value.detach()), value.requires_grad)
        module.register_parameter(name, value)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would: it has no effect on an autograd Function."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _GatherImages(Function):
    """First layer: gather the features of all images; compute this rank's units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        # Fast ranks wait here for slow ones; the later exchanges of the pass are in step.
        with group.wait_context(), group.exchange_context():
            gathered = group.all_gather(group.pad(x)).flatten(0, 1)
        ctx.save_for_backward(gathered, weight)
        ctx.group, ctx.num_images, ctx.has_bias = group, len(x), bias is not None
        return F.linear(gathered, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gathered, weight = ctx.saved_tensors
        group: Group = ctx.group
        grad_x = group.start_reduce_scatter((grad @ weight).unflatten(0, (group.size, -1)))
        grad_weight = grad.T @ gathered  # overlaps with the reduce-scatter
        grad_bias = grad.sum(0) if ctx.has_bias else None
        with group.exchange_context():
            own_grad_x = grad_x()[: ctx.num_images]
        return own_grad_x * group.world_size, grad_weight, grad_bias, None


class _ScatterUnits(Function):
    """Middle layers: partial sums of all units -> complete sums of this rank's units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, outputs: Shard) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.outputs, sizes = outputs, outputs.sizes()
        partial = F.linear(x, weight)  # [images, units]
        blocks = partial.new_zeros(len(sizes), len(x), sizes[0])
        for block, units in zip(blocks, partial.split(sizes, 1)):
            block[:, : units.shape[1]] = units
        with outputs.group.exchange_context():
            return outputs.group.reduce_scatter(blocks)[:, : sizes[outputs.group.rank]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        sizes, group = ctx.outputs.sizes(), ctx.outputs.group
        with group.exchange_context():
            blocks = group.all_gather(F.pad(grad, (0, sizes[0] - grad.shape[1])))
        full = torch.cat([block[:, :size] for block, size in zip(blocks, sizes)], 1)
        return full @ weight, full.T @ x, None


class _ScatterImages(Function):
    """Last layer: partial logits of all images -> complete logits of this rank's, without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        partial = F.linear(x, weight).unflatten(0, (group.size, -1))
        with group.exchange_context():
            return group.reduce_scatter(partial)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        group: Group = ctx.group
        with group.exchange_context():
            full = group.all_gather(grad / group.world_size).flatten(0, 1)
        return full @ weight, full.T @ x, None
