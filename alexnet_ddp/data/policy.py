"""RandAugment (Cubuk 2020) and TrivialAugment Wide (Müller and Hutter 2021).

torchvision's transforms of these names draw from a generator that all threads share, so their
results cannot be reproduced. This module uses the same operations and magnitudes, with
torchvision's uint8 kernels, but draws them by hash from (seed, epoch, image index).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from alexnet_ddp import rng
from alexnet_ddp.config import Policy, RandomAugmentConfig

if TYPE_CHECKING:  # torch and torchvision take seconds to import, and only a policy needs them here
    from torch import Tensor

_GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_COLOUR = ("Brightness", "Color", "Contrast", "Sharpness")
# The largest magnitudes. Translations are fractions of the side in RandAugment and pixels in
# TrivialAugment.
_SIGNED = {
    Policy.randaugment: dict(zip(_GEOMETRY, (0.3, 0.3, 150 / 331, 150 / 331, 30.0)))
    | dict.fromkeys(_COLOUR, 0.9),
    Policy.trivialaugment: dict(zip(_GEOMETRY, (0.99, 0.99, 32.0, 32.0, 135.0)))
    | dict.fromkeys(_COLOUR, 0.99),
}
_FEWEST_BITS = {Policy.randaugment: 4, Policy.trivialaugment: 2}  # of Posterize
OPERATIONS = ("Identity", *_GEOMETRY, *_COLOUR, "Posterize", "Solarize", "AutoContrast", "Equalize")
NUM_BINS = 31  # of magnitudes

Operation = tuple[str, float]  # name, magnitude


def draw_operations(
    cfg: RandomAugmentConfig, key: int, indices: np.ndarray, size: int
) -> list[list[Operation]]:
    """Draw the operations for each of the images `indices`, in the order of their application.

    key: from rng.fold; size: height = width of the images in pixels.
    """
    if cfg.policy is Policy.none:
        return [[] for _ in indices]
    num_ops = 1
    if cfg.policy is Policy.randaugment:
        assert cfg.num_ops is not None  # the constructor replaces null
        num_ops = cfg.num_ops
    u = rng.uniforms(key, indices, 3 * num_ops).reshape(len(indices), num_ops, 3)
    which, bins = (u[:, :, 0] * len(OPERATIONS)).astype(int), (u[:, :, 1] * NUM_BINS).astype(int)
    if cfg.policy is Policy.randaugment:
        bins[...] = cfg.magnitude
    signs = np.where(u[:, :, 2] < 0.5, -1, 1)
    return [
        [(OPERATIONS[k], magnitude(cfg.policy, OPERATIONS[k], b, s, size)) for k, b, s in zip(*row)]
        for row in zip(which.tolist(), bins.tolist(), signs.tolist())
    ]


def magnitude(policy: Policy, name: str, bin_: int, sign: int, size: int) -> float:
    """The magnitude of an operation for bin 0 to 30, exactly as in torchvision (float32).

    Returns 0 for operations without a magnitude.
    """
    if name in _SIGNED[policy]:
        scale = size if policy is Policy.randaugment and name.startswith("Translate") else 1
        return sign * _scale(0.0, _SIGNED[policy][name] * scale)[bin_]
    if name == "Posterize":
        return round(_scale(8.0, float(_FEWEST_BITS[policy]))[bin_])
    return _scale(1.0, 0.0)[bin_] if name == "Solarize" else 0.0


def operate(slot: np.ndarray, operations: list[Operation]) -> None:
    """Apply `operations` to slot, uint8 [size, size, 3], in place."""
    if operations:
        import torch

        image = torch.from_numpy(slot).permute(2, 0, 1)
        for name, amount in operations:
            image = _kernels()[name](image, amount)
        slot[...] = image.permute(1, 2, 0).numpy()


@cache
def _scale(first: float, last: float) -> list[float]:
    import torch

    return torch.linspace(first, last, NUM_BINS).tolist()


@cache
def _kernels() -> dict[str, Callable[["Tensor", float], "Tensor"]]:
    """torchvision's kernels by the name of the operation; they take uint8 [3, H, W] images."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    def affine(
        image: "Tensor", x: float = 0, y: float = 0, shear: tuple[float, float] = (0, 0)
    ) -> "Tensor":
        degrees = [math.degrees(math.atan(s)) for s in shear]
        corner = [0, 0] if any(shear) else None
        mode = InterpolationMode.BILINEAR
        return F.affine(
            image, 0.0, [int(x), int(y)], 1.0, degrees, interpolation=mode, center=corner
        )

    return {
        "Identity": lambda image, m: image,
        "ShearX": lambda image, m: affine(image, shear=(m, 0)),
        "ShearY": lambda image, m: affine(image, shear=(0, m)),
        "TranslateX": lambda image, m: affine(image, x=m),
        "TranslateY": lambda image, m: affine(image, y=m),
        "Rotate": lambda image, m: F.rotate(image, m, interpolation=InterpolationMode.BILINEAR),
        "Brightness": lambda image, m: F.adjust_brightness(image, 1 + m),
        "Color": lambda image, m: F.adjust_saturation(image, 1 + m),
        "Contrast": lambda image, m: F.adjust_contrast(image, 1 + m),
        "Sharpness": lambda image, m: F.adjust_sharpness(image, 1 + m),
        "Posterize": lambda image, m: F.posterize(image, round(m)),
        "Solarize": lambda image, m: F.solarize(image, 255 * m),
        "AutoContrast": lambda image, m: F.autocontrast(image),
        "Equalize": lambda image, m: F.equalize(image),
    }
