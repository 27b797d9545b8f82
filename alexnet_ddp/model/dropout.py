"""Dropout without a generator: which unit of which image is dropped in which step is a function of exactly that.

No rank, restart or micro-batch changes a mask. 64 x 9,216 units cost 1.3 ms on one thread, torch's own dropout 7 ms.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from alexnet_ddp import rng
from alexnet_ddp.config import ConfigError


class KeyedDropout(nn.Module):
    """Dropout (Srivastava 2014) whose mask is a hash of (key of the image in this step, layer, unit).

    `whole_image=True` keeps or drops an image's whole input at once: stochastic depth (Huang 2016), by row.
    """

    def __init__(self, p: float, layer: int, whole_image: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.whole_image = p, layer, whole_image
        # int32 [n], set before each forward pass by set_dropout_keys; or what returns them, where they still travel.
        self.keys: Tensor | Callable[[], Tensor] | None = None
        self.first_unit = 0  # where x is a part of a layer's units

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, ...] -> the same shape."""
        if not self.training or self.p == 0:
            return x
        num_units = 1 if self.whole_image else x[0].numel()
        first = self.first_unit + 1
        unit = rng.mix(torch.arange(first, first + num_units, dtype=torch.int32, device=x.device))
        keys = self.keys() if callable(self.keys) else self.keys
        words = rng.mix(rng.mix(keys + self.layer)[:, None] + unit)
        keep = words >= int(self.p * 2**32) - 2**31
        shape = (len(x), *[1] * (x.dim() - 1)) if self.whole_image else x.shape
        return x * (keep.view(shape) * (1 / (1 - self.p))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def set_dropout_keys(model: nn.Module, seed: int, step: int, indices: Tensor) -> None:
    """Fix the masks of the next forward pass: `indices` (int32 [n]) says which images it sees."""
    keys = rng.hash32(rng.fold(seed, rng.DROPOUT, step), indices)
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.keys = keys


_FUNCTIONAL = (
    "dropout",
    "attention_dropout",
    "drop_rate",
    "drop_prob",
)  # rates of modules that call F.dropout, or a generator, themselves


def key_dropout(model: nn.Module) -> None:
    """Replace what would draw from a generator in a forward pass by its keyed twin."""
    twins: dict[type, Callable[[nn.Module, int], nn.Module]] = {
        nn.Dropout: lambda old, layer: KeyedDropout(old.p, layer),
        StochasticDepth: lambda old, layer: KeyedDropout(old.p, layer, whole_image=True),
    }
    layer = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in twins:
                layer += 1
                setattr(parent, name, twins[type(child)](child, layer))
    for module in model.modules():
        # A whole network may only record its `dropout`, as torchvision's VisionTransformer does.
        rates = _FUNCTIONAL if module is not model else ("drop_rate",)
        if isinstance(module, nn.modules.dropout._DropoutNd) or any(
            isinstance(rate := getattr(module, name, 0), float) and rate > 0 for name in rates
        ):
            rule = "draws its dropout from a generator, so that it could not be resumed exactly"
            remedy = "set model.dropout=0, or in a network of your own use torch.nn.Dropout"
            raise ConfigError(f"{type(module).__name__} in this network {rule}; {remedy}")
