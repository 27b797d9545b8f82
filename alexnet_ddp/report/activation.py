"""Class activation maps: which part of an image speaks for a class.

Grad-CAM (R. R. Selvaraju et al., 2017): the channels of the last convolution, weighted by the mean
gradient of the class's logit.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp.data.picture import enlarged
from alexnet_ddp.model import find_head

_MIN_SIDE = 3  # values of a map; fewer show no place
_OPACITY = 0.55
# Colours of a map from nothing to the largest value: transparent blue, yellow, red.
_COLOURS = np.array([[20, 40, 120], [30, 140, 190], [250, 210, 60], [220, 40, 30]], np.float32)


def activation_maps(model: nn.Module, images: Tensor, classes: Tensor) -> np.ndarray | None:
    """A map for each image and its class, float32 [n, height, width] in [0, 1].

    None if no convolution after the first layer has at least 3 x 3 positions, so that there is
    nothing to map. model: in evaluation mode. images: float [n, 3, size, size]; classes:
    int64 [n]; on the model's device. A value that is not finite becomes 0.
    """
    layer = _layer(model, images[:1])
    if layer is None:
        return None
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = model(images.detach().clone().requires_grad_())
            chosen = logits.gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    found = (weights * kept[-1]).sum(1).relu().detach().float().cpu()
    maps = found.nan_to_num(0, posinf=0).numpy()
    return maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-12)


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The image, uint8 [size, size, 3], under a map, float [height, width] in [0, 1]."""
    strength = enlarged(values, len(pixels)).clip(0, 1)
    place = strength * (len(_COLOURS) - 1)
    low = place.astype(int).clip(0, len(_COLOURS) - 2)
    share = (place - low)[..., None]
    colours = _COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share
    opacity = _OPACITY * np.sqrt(strength)[..., None]
    return (pixels * (1 - opacity) + colours * opacity).round().clip(0, 255).astype(np.uint8)


def _layer(model: nn.Module, image: Tensor) -> nn.Module | None:
    """The last module whose output has the height and width of the last convolution's.

    That is its activation, or the block that contains it: their values are what the network uses.
    """
    head, outputs = find_head(model), list[tuple[nn.Module, bool, tuple[int, ...]]]()
    handles = [
        module.register_forward_hook(_recorder(outputs, isinstance(module, nn.Conv2d)))
        for name, module in model.named_modules()
        if name not in ("", head)
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [size for _, is_convolution, size in outputs if is_convolution]
    if len(sizes) < 2 or min(sizes[-1]) < _MIN_SIDE:
        return None
    return next(module for module, _, size in reversed(outputs) if size == sizes[-1])


def _recorder(outputs: list[tuple[nn.Module, bool, tuple[int, ...]]], is_convolution: bool) -> Any:
    """A hook that adds modules whose output has channels, height and width."""

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            outputs.append((module, is_convolution, tuple(output.shape[2:])))

    return record
