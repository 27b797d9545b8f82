"""Dropout without a generator: the mask is a function of (seed, step, image index, layer, unit).

Ranks, restarts and micro-batches therefore do not change a mask. 64 x 9,216 units take 1.3 ms on
one thread, torch's dropout 7 ms.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from alexnet_ddp import rng
from alexnet_ddp.config import ConfigError


class KeyedDropout(nn.Module):
    """Dropout (Srivastava 2014) whose mask is a hash of (key of the image and step, layer, unit).

    p: the probability of dropping a unit. layer: the number of this module in the network.
    whole_image: keep or drop the whole input of an image: stochastic depth by row (Huang 2016).
    """

    def __init__(self, p: float, layer: int, whole_image: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.whole_image = p, layer, whole_image
        # int32 [n], set before each forward pass by set_dropout_keys(); or a function that returns
        # them, if they are still being received from other ranks.
        self.keys: Tensor | Callable[[], Tensor] | None = None
        self.first_unit = 0  # the index of the first unit if x is a shard of the layer's units

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of x, [n, ...]; returns the same shape."""
        if not self.training or self.p == 0:
            return x
        num_units = 1 if self.whole_image else x[0].numel()
        first = self.first_unit + 1
        unit = rng.mix(torch.arange(first, first + num_units, dtype=torch.int32, device=x.device))
        keys = self.keys() if callable(self.keys) else self.keys
        if keys is None:
            raise RuntimeError(
                "dropout needs a key for each image; call alexnet_ddp.model.set_dropout_keys() "
                "before each forward pass in training mode"
            )
        words = rng.mix(rng.mix(keys + self.layer)[:, None] + unit)
        keep = words >= int(self.p * 2**32) - 2**31
        shape = (len(x), *[1] * (x.dim() - 1)) if self.whole_image else x.shape
        return x * (keep.view(shape) * (1 / (1 - self.p))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def set_dropout_keys(model: nn.Module, seed: int, step: int, indices: Tensor) -> None:
    """Set the masks of the next forward pass, over the images `indices` (int32 [n])."""
    keys = rng.hash32(rng.fold(seed, rng.DROPOUT, step), indices)
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.keys = keys


# Attributes with the dropout rate of modules that call F.dropout, or a generator, themselves.
_FUNCTIONAL = ("dropout", "attention_dropout", "drop_rate", "drop_prob")


def key_dropout(model: nn.Module) -> None:
    """Replace the dropout modules of `model`, in place, by KeyedDropout.

    Raises ConfigError for modules that draw their dropout from a generator in another way.
    """
    layer = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.Dropout | StochasticDepth):
                continue
            if type(child) in (nn.Dropout, StochasticDepth):  # not a subclass of the user's
                layer += 1
                whole_image = isinstance(child, StochasticDepth)
                setattr(parent, name, KeyedDropout(child.p, layer, whole_image))
    for module in model.modules():
        # A whole network may only record its `dropout`, as torchvision's VisionTransformer does.
        if _uses_generator(module, _FUNCTIONAL if module is not model else ("drop_rate",)):
            rule = "draws its dropout from a generator, so that it could not be resumed exactly"
            remedy = "set model.dropout=0, or in a network of your own use torch.nn.Dropout"
            raise ConfigError(f"{type(module).__name__} in this network {rule}; {remedy}")


def _uses_generator(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether `module` is another kind of dropout, or has a rate above 0 among `names`."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return True
    rates = [getattr(module, name, 0) for name in names]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
