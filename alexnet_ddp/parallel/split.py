"""The large linear layers of a classifier, split over a group of ranks (Krizhevsky 2014, "One weird trick").

A rank brings the features of its images and gets their logits. In between, all ranks of the group see all images, each
with its part of the units: the features are gathered; the first layer is split by columns, which are its output units;
every other one by rows, its input units, so that its outputs are partial sums. They are added where they are needed:
those of the last layer at the rank that has the image, all others at the rank that has the unit.

Gradients: outside, a loss carries the factor world_size that DDP's mean takes away. Inside nobody divides, so the
factor is taken away at the last layer and put back at the first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from alexnet_ddp.parallel.group import Group, Part


class ColumnLinear(nn.Module):
    """The first split layer. weight: [units of this rank, inputs]."""

    def __init__(self, whole: nn.Linear, group: Group) -> None:
        super().__init__()
        self.group = group
        self.parts = {"weight": Part(0, whole.weight.shape, group)}
        if whole.bias is not None:
            self.parts["bias"] = Part(0, whole.bias.shape, group)
        _take(self, whole)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x: [n, inputs], of this rank's images -> [size * slots, units of this rank], of the images of all."""
        x, weight, bias = _cast(x, self.weight, self.bias)
        return _GatherImages.apply(x, weight, bias, self.group)


class RowLinear(nn.Module):
    """A split layer behind another one. weight: [outputs, inputs that this rank has]; is_last: its outputs go home."""

    def __init__(self, whole: nn.Linear, group: Group, is_last: bool) -> None:
        super().__init__()
        self.group, self.is_last = group, is_last
        self.parts = {"weight": Part(1, whole.weight.shape, group)}
        if whole.bias is not None and not is_last:
            self.parts["bias"] = Part(0, whole.bias.shape, group)
        self.outputs = Part(0, whole.weight.shape, group)
        _take(self, whole)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x: [size * slots, units of this rank] -> the same of the next units; or [n, outputs] of its images."""
        x, weight, bias = _cast(x, self.weight, self.bias)
        if self.is_last:
            logits = _ScatterImages.apply(x, weight, self.group)[: self.group.count]
            return logits if bias is None else logits + bias
        out = _ScatterUnits.apply(x, weight, self.outputs)
        return (
            out.clone() if bias is None else out + bias
        )  # not a view: what follows may work in place


def _take(module: nn.Module, whole: nn.Linear) -> None:
    """This rank's part of the parameters; the whole one where there is no part."""
    for name in ("weight", "bias"):
        value = getattr(whole, name)
        if value is not None and name in module.parts:
            value = nn.Parameter(module.parts[name].of(value.detach()), value.requires_grad)
        module.register_parameter(name, value)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast would, which does not look into a Function."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _GatherImages(Function):
    """The first layer: features of all images, and this rank's units of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        with group.waiting():  # a slow rank is waited for here; behind it all go in step
            gathered = group.gather(group.padded(x)).flatten(0, 1)
        ctx.save_for_backward(gathered, weight)
        ctx.group, ctx.count, ctx.has_bias = group, len(x), bias is not None
        return F.linear(gathered, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gathered, weight = ctx.saved_tensors
        group: Group = ctx.group
        to_images = group.start_scatter_sum((grad @ weight).unflatten(0, (group.size, -1)))
        grad_weight = grad.T @ gathered  # while the other gradient travels
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return to_images()[: ctx.count] * group.world_size, grad_weight, grad_bias, None


class _ScatterUnits(Function):
    """Partial sums of all units -> this rank's units, complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, outputs: Part) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.outputs, sizes = outputs, outputs.sizes()
        partial = F.linear(x, weight)  # [images, units]
        blocks = partial.new_zeros(len(sizes), len(x), sizes[0])
        for block, units in zip(blocks, partial.split(sizes, 1)):
            block[:, : units.shape[1]] = units
        return outputs.group.scatter_sum(blocks)[:, : sizes[outputs.group.rank]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        sizes, group = ctx.outputs.sizes(), ctx.outputs.group
        blocks = group.gather(F.pad(grad, (0, sizes[0] - grad.shape[1])))
        whole = torch.cat(
            [block[:, :units] for block, units in zip(blocks, sizes)], 1
        )  # [images, units]
        return whole @ weight, whole.T @ x, None


class _ScatterImages(Function):
    """Partial logits of all images -> those of this rank's images, complete, without their bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return group.scatter_sum(F.linear(x, weight).unflatten(0, (group.size, -1)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        group: Group = ctx.group
        whole = group.gather(grad / group.world_size).flatten(0, 1)
        return whole @ weight, whole.T @ x, None
